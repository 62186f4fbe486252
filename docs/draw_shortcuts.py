"""Draws docs/shortcuts.png: three shortcut plans for a tower of 5 blocks and an LLM of 7 layers.

python docs/draw_shortcuts.py          (run from the project folder)
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from sparsecut_jax.models.shortcuts import wire_shortcuts  # noqa: E402
from sparsecut_jax.runs.wiring_plot import draw_shortcuts  # noqa: E402
from sparsecut_jax.runtime.figures import plt  # noqa: E402
from sparsecut_jax.settings import ShortcutConfig  # noqa: E402

PLANS = {
    "none: LLaVA-1.5": ShortcutConfig(density="none"),
    "sparse, uniform, u: the paper's plan": ShortcutConfig(count=3),
    "dense, uniform, parallel": ShortcutConfig(density="dense", order="parallel"),
}

figure, panels = plt.subplots(1, len(PLANS), figsize=(12, 3.6), dpi=110)
for axes, (title, shortcuts) in zip(panels, PLANS.items(), strict=True):
    draw_shortcuts(axes, wire_shortcuts(shortcuts, vit_depth=5, llm_depth=7))
    axes.set(xlim=(-0.1, 4.1), ylim=(-1.5, 7.1))
    axes.set_title(title, fontsize=10)
figure.tight_layout()
figure.savefig(os.path.join(os.path.dirname(os.path.abspath(__file__)), "shortcuts.png"))
