"""Draws pictures of Scenes with their questions and answers."""

from __future__ import annotations

import os

import numpy as np

from sparsecut_jax.data import scenes
from sparsecut_jax.data.images import square
from sparsecut_jax.data.scenes import TEMPLATES
from sparsecut_jax.runtime.figures import plt
from sparsecut_jax.settings import ScenesConfig


def gallery(path: str | os.PathLike, size: int, low: int, count: int = 4, seed: int = 0) -> None:
    """Draws the first `count` training pictures, one per line, into a PNG file.

    Fine questions are beside the full picture, which shows their answers, and coarse ones beside its low-res view. The
    two pictures of a pair follow one another.
    """
    rows = scenes.rows(ScenesConfig(size=size, train=count, seed=seed), "train", size, low)
    ratios = [1.45, 1.0, 1.0, 1.0]  # picture, questions, low-res view, questions
    figure, panels = plt.subplots(count, 4, figsize=(14, 4.3 * count), dpi=80, squeeze=False, width_ratios=ratios)
    for row, (full, fine, view, coarse) in zip(rows, panels, strict=True):
        picture = rows.open(row["image"])
        for axes, image, title in (
            (full, picture, f"{row['id']}: full picture, {size} x {size}"),
            (view, square(picture, low, low, "pad"), f"low-res view, {low} x {low}"),
        ):
            axes.imshow(np.asarray(image), interpolation="nearest")
            axes.set_title(title, fontsize=11)
        for axes, scale in ((fine, "fine"), (coarse, "coarse")):
            axes.text(0, 0.5, questions(row, scale), fontsize=10, va="center", transform=axes.transAxes)
        for axes in (full, fine, view, coarse):
            axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def questions(row: dict, scale: str) -> str:
    """The questions of a row of one scale, by level, with their answers."""
    turns, lines = row["conversations"], []
    for level in scenes.LEVELS:
        lines.append(f"{level} level, {scale}")
        for template, human, gpt in zip(TEMPLATES, turns[::2], turns[1::2], strict=True):
            if (template.level, template.scale) == (level, scale):
                question = human["value"].split("\n")[1]
                lines.append(f"  {_wrapped(question)} {gpt['value']}")
        lines.append("")
    return "\n".join(lines[:-1])


def _wrapped(question: str, width: int = 30) -> str:
    if len(question) <= width:
        return question
    cut = question.rindex(" ", 0, width)
    return f"{question[:cut]}\n    {question[cut + 1 :]}"
