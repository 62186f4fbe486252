"""Draws which tower level enters which LLM layer."""

from __future__ import annotations

import os

from matplotlib.patches import FancyBboxPatch

from sparsecut_jax.models.shortcuts import Plan
from sparsecut_jax.runtime.figures import plt


def save_plan(path: str | os.PathLike, plan: Plan, title: str = "") -> None:
    """Draws the tower on the left, the LLM on the right and an arrow for every shortcut, and writes a PNG file."""
    figure, axes = plt.subplots(figsize=(6, 1.2 + 0.32 * max(plan.vit_depth, plan.llm_depth)), dpi=120)
    height = max(plan.vit_depth, plan.llm_depth)
    draw_plan(axes, plan)
    axes.set(xlim=(-0.2, 4.2), ylim=(-1.9, height + 0.4), title=title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_plan(axes: plt.Axes, plan: Plan) -> None:
    """Draws a plan; y is the index of a block or layer, with the first at the bottom."""
    colors = plt.get_cmap("viridis")

    def box(x: float, y: float, text: str, color: str, bold: bool = False) -> None:
        axes.add_patch(FancyBboxPatch((x, y + 0.12), 1.2, 0.62, boxstyle="round,pad=0.02", fc=color, ec="#444", lw=0.8))
        weight = "bold" if bold else "normal"
        axes.text(x + 0.6, y + 0.43, text, ha="center", va="center", fontsize=8, weight=weight)

    for level in range(plan.vit_depth):
        used = level in plan.levels or level == plan.main_level
        box(0, level, f"ViT {level}", "#dbe9f6" if used else "#f2f2f2", level == plan.main_level)
    for layer in range(plan.llm_depth):
        box(2.8, layer, f"LLM {layer}", "#fde5cf" if any(layer == at for _, at in plan.pairs) else "#f2f2f2")
    box(2.8, -1.3, "embeddings", "#fde5cf", True)
    arrow = {"arrowstyle": "-|>", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        "", (2.78, -0.87), (1.22, plan.main_level + 0.43), arrowprops={**arrow, "color": "#555", "linestyle": "--"}
    )
    for level, layer in plan.pairs:
        color = colors(0.1 + 0.75 * level / max(1, plan.vit_depth - 1))
        axes.annotate("", (2.78, layer + 0.43), (1.22, level + 0.43), arrowprops={**arrow, "color": color})
    axes.set_axis_off()
