"""Draws which tower level, or which other source, enters which LLM layer."""

from __future__ import annotations

import os

from matplotlib.patches import FancyBboxPatch

from sparsecut_jax.models.interfaces import Wiring
from sparsecut_jax.models.shortcuts import Shortcuts
from sparsecut_jax.runtime.figures import plt


def save_wiring(path: str | os.PathLike, wiring: Wiring, title: str = "") -> None:
    """Draws the tower or the sources on the left, the LLM on the right and an arrow for every entry; writes a PNG file."""
    shortcuts = wiring.shortcuts
    left = len(wiring.names) if shortcuts is None else shortcuts.vit_depth
    height = max(left, len(wiring.entering))
    figure, axes = plt.subplots(figsize=(6, 1.2 + 0.32 * height), dpi=120)
    draw_shortcuts(axes, shortcuts) if shortcuts is not None else draw_sources(axes, wiring)
    axes.set(xlim=(-0.2, 4.2), ylim=(-1.9, height + 0.4), title=title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_shortcuts(axes: plt.Axes, shortcuts: Shortcuts) -> None:
    """Draws pairs of tower level and layer; y is the index of a block or layer, with the first at the bottom."""
    for level in range(shortcuts.vit_depth):
        main = level == shortcuts.main_level
        box(axes, 0, level, f"ViT {level}", BLUE if main or level in shortcuts.levels else GREY, main)
    for layer in range(shortcuts.llm_depth):
        box(axes, 2.8, layer, f"LLM {layer}", ORANGE if any(layer == at for _, at in shortcuts.pairs) else GREY)
    box(axes, 2.8, -1.3, "embeddings", ORANGE, True)
    arrow(axes, shortcuts.main_level, -1.3, color="#555", linestyle="--")
    for level, layer in shortcuts.pairs:
        arrow(axes, level, layer, color=shade(level, shortcuts.vit_depth))
    axes.set_axis_off()


def draw_sources(axes: plt.Axes, wiring: Wiring) -> None:
    """Draws sources that are no tower levels, each with an arrow to every layer that it enters."""
    box(axes, 0, -1.3, "image tokens", BLUE, True)
    for row, name in enumerate(wiring.names):
        box(axes, 0, row, name, BLUE)
    for layer, rows in enumerate(wiring.entering):
        box(axes, 2.8, layer, f"LLM {layer}", ORANGE if rows else GREY)
        for row in rows:
            arrow(axes, row, layer, color=shade(row, len(wiring.names)))
    box(axes, 2.8, -1.3, "embeddings", ORANGE, True)
    if wiring.positions:
        arrow(axes, -1.3, -1.3, color="#555", linestyle="--")
    axes.set_axis_off()


BLUE, ORANGE, GREY = "#dbe9f6", "#fde5cf", "#f2f2f2"


def shade(index: int, count: int) -> tuple[float, ...]:
    return plt.get_cmap("viridis")(0.1 + 0.75 * index / max(1, count - 1))


def box(axes: plt.Axes, x: float, y: float, text: str, color: str, bold: bool = False) -> None:
    axes.add_patch(FancyBboxPatch((x, y + 0.12), 1.2, 0.62, boxstyle="round,pad=0.02", fc=color, ec="#444", lw=0.8))
    weight = "bold" if bold else "normal"
    axes.text(x + 0.6, y + 0.43, text, ha="center", va="center", fontsize=8, weight=weight)


def arrow(axes: plt.Axes, left: float, right: float, **style: str) -> None:
    """From the box at height `left` in the left column to the one at `right` in the right column."""
    shape = {"arrowstyle": "-|>", "lw": 1.2, "shrinkA": 0, "shrinkB": 0, **style}
    axes.annotate("", (2.78, right + 0.43), (1.22, left + 0.43), arrowprops=shape)
