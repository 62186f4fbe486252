"""easy-VQA (PyPI `easy-vqa`, MIT): synthetic pictures of one shape and questions about them, as rows in LLaVA's format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from sparsecut_jax.text.conversation import GPT, HUMAN, IMAGE

COLORS = ("black", "gray", "red", "blue", "green", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")


def kind(answer: str) -> str:
    """The kind of question that an answer belongs to: "yes/no", "color" or "shape"."""
    return "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"


def load(split: str) -> tuple[list[dict[str, Any]], str]:
    """Rows of an official split ("train" or "test"), one per image with all its questions, and the image folder."""
    import easy_vqa

    read = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in zip(*read(), strict=True):
        by_image.setdefault(image, []).append((question, answer))
    folder = os.path.join(os.path.dirname(easy_vqa.__file__), "data", split, "images")
    return [_row(f"{split}/{image}", f"{image}.png", by_image[image]) for image in sorted(by_image)], folder


def _row(name: str, image: str, questions: Iterable[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for i, (question, answer) in enumerate(questions):
        turns.append({"from": HUMAN, "value": (IMAGE + "\n" if i == 0 else "\n") + question})
        turns.append({"from": GPT, "value": answer, "kind": kind(answer)})
    return {"id": name, "image": image, "independent": True, "conversations": turns}


def captions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Caption rows ("a red circle") derived from the answers of `rows`; rows that do not determine one are omitted."""
    captioned = []
    for row in rows:
        turns = row["conversations"]
        color = _find(COLORS, turns)
        shape = _find(SHAPES, turns)
        if color and shape:
            conversation = [{"from": HUMAN, "value": IMAGE}, {"from": GPT, "value": f"a {color} {shape}"}]
            captioned.append({"id": row["id"] + "/caption", "image": row["image"], "conversations": conversation})
    return captioned


def _find(words: tuple[str, ...], turns: list[dict[str, str]]) -> str | None:
    """The one of `words` that the turns show to be true of the picture, or None.

    It follows from an answer ("red"), a question ("what color is the circle?"), a yes, or noes that leave a single word.
    """
    ruled_out = set()
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        question, answer = human["value"], gpt["value"]
        if answer in words:
            return answer
        named = [word for word in words if re.search(rf"\b{word}\b", question)]
        if not named:
            continue
        if answer not in ("yes", "no"):
            return named[0]
        negated = re.search(r"\b(no|not)\b", question) is not None
        if (answer == "yes") != negated:
            return named[0]
        ruled_out.add(named[0])
    left = set(words) - ruled_out
    return left.pop() if len(left) == 1 else None
