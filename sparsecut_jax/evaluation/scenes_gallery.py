"""Pictures of Scenes with their questions and answers, for eyes."""

from __future__ import annotations

import os

import numpy as np

from sparsecut_jax.data import scenes
from sparsecut_jax.data.images import square
from sparsecut_jax.data.scenes import TEMPLATES
from sparsecut_jax.settings import ScenesConfig
from sparsecut_jax.training.plots import plt


def gallery(path: str | os.PathLike, size: int, low: int, count: int = 4, seed: int = 0) -> None:
    """Draws the first `count` training pictures, the two of a pair side by side.

    Each picture stands beside its low-res view, enlarged, and above its questions, cell by cell.
    """
    rows = scenes.rows(ScenesConfig(size=size, train=count, seed=seed), "train", size, low)
    lines = -(-count // 2)
    figure, panels = plt.subplots(2 * lines, 4, figsize=(14, 5.6 * lines), dpi=80, height_ratios=[3.4, 1.9] * lines)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, row in enumerate(rows):
        line, column = 2 * (i // 2), 2 * (i % 2)
        picture = rows.open(row["image"])
        for axes, image, title in (
            (panels[line, column], picture, f"{row['id']}, {size} x {size}"),
            (panels[line, column + 1], square(picture, low, low, "pad"), f"its low-res view, {low} x {low}"),
        ):
            axes.imshow(np.asarray(image), interpolation="nearest")
            axes.set_title(title, fontsize=10)
        for axes, scale in ((panels[line + 1, column], "coarse"), (panels[line + 1, column + 1], "fine")):
            axes.text(0, 1, _answers(row, scale), fontsize=8.5, va="top", transform=axes.transAxes)
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def _answers(row: dict, scale: str) -> str:
    turns, text = row["conversations"], []
    for level in scenes.LEVELS:
        text.append(f"{level} level, {scale}")
        for template, human, gpt in zip(TEMPLATES, turns[::2], turns[1::2], strict=True):
            if (template.level, template.scale) == (level, scale):
                question = human["value"].split("\n")[1]
                text.append(f"   {_wrapped(question)} {gpt['value']}")
    return "\n".join(text)


def _wrapped(question: str, width: int = 34) -> str:
    if len(question) <= width:
        return question
    cut = question.rindex(" ", 0, width)
    return f"{question[:cut]}\n      {question[cut + 1 :]}"
