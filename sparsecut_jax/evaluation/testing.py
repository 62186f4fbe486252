"""Asks about all rows of a part what the run's task asks about them; every image is encoded once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from sparsecut_jax.data.parts import Folder, Part
from sparsecut_jax.data.walk import as_bad
from sparsecut_jax.inference.engine import Engine
from sparsecut_jax.runtime import placing
from sparsecut_jax.tasks.registry import Task
from sparsecut_jax.text.conversation import IMAGE, Row, images_of
from sparsecut_jax.types import Answered, AskedRow, BadSample

ROWS_AT_ONCE = 64  # whose images are encoded together
FIRST, SHORT = 50, 100  # rows searched for an example; characters of a short question
REASON = 1024  # bytes of an error about a broken row that other processes get


@dataclasses.dataclass(frozen=True)
class Progressed:
    """The answers to the questions of some rows, and a sentence for each row that could not be read."""

    rows: int
    answered: list[Answered]
    broken: list[str]


def rows_of(part: Part) -> Iterator[Row]:
    """The rows of a part that can be read."""
    for i in range(len(part)):
        with contextlib.suppress(BadSample):
            yield part.row(i)


def answer_part(engine: Engine, task: Task, part: Part, test: str, limit: int) -> Iterator[Progressed]:
    """Answers all questions of a part in up to `limit` tokens each, some rows at a time.

    Each process opens the images that its devices encode; all processes get all answers.
    """
    for start in range(0, len(part), engine.rows):
        numbers = range(start, min(start + engine.rows, len(part)))
        rows, views, broken = read_rows(engine, task, part, numbers)
        asked = [
            AskedRow(
                test=test,
                name=str(row.get("id", part.number(numbers[place]))),
                place=place,
                row=row,
                images=tuple(image_path(part, entry) for entry in images_of(row)),
            )
            for place, row in rows.items()
        ]
        yield Progressed(len(numbers), task.answers(engine, asked, views, limit), broken)


def read_rows(engine: Engine, task: Task, part: Part, numbers: range) -> tuple[dict[int, Row], np.ndarray, list[str]]:
    """Rows of a part by their index in `numbers`, the pictures of those that are encoded here, and what is wrong with others.

    All processes agree on the rows that are broken, although each opens its own pictures alone.
    """
    rows, views, reasons = {}, engine.no_pictures(), np.zeros((engine.rows, REASON), np.uint8)
    places = {int(at): i for i, at in enumerate(engine.here)}
    for at, number in enumerate(numbers):
        row = {}
        try:
            row = rows[at] = part.row(number)
            task.check_row(row)
            if at in places:
                for m, entry in enumerate(images_of(row)):
                    views[places[at], m] = engine.run.pictures.read(part, entry)
        except BadSample as error:
            reason = as_bad(part, number, row, error).reason.encode()[:REASON]
            reasons[at, : len(reason)] = np.frombuffer(reason, np.uint8)
    reasons = placing.gather(reasons).max(0)  # all processes that know it agree
    broken = {at: bytes(reasons[at]).rstrip(b"\0").decode(errors="ignore") for at in reasons.any(1).nonzero()[0]}
    return {at: row for at, row in rows.items() if at not in broken}, views, list(broken.values())


def image_path(part: Part, entry: str | bytes) -> str | None:
    """Path of the image of an entry of a row; None if it is not a file."""
    if isinstance(entry, bytes) or not isinstance(part.pictures, Folder):
        return None
    return os.path.join(part.pictures.path, entry)


def example(parts: list[Part]) -> tuple[str, list[str]]:
    """A question of one of the first rows, and the paths of its images; short and about image files, if possible.

    "PATH" stands for an image that is not a file, such as one in a TFDS dataset.
    """
    best, asked = (-1,), ("what is in the image?", ["PATH"])
    for part in parts:
        for i in range(min(len(part), FIRST)):
            try:
                row = part.row(i)
            except BadSample:
                continue
            human = row["conversations"][0]
            text = human["value"] if human["value"].count(IMAGE) > 1 else human["value"].replace(IMAGE, "").strip()
            entries = images_of(row) if row.get("independent") else images_of(row)[: human["value"].count(IMAGE)]
            images = [image_path(part, entry) or "PATH" for entry in entries]
            files = bool(images) and all(map(os.path.exists, images))
            rank = (files, bool(text) and len(text) <= SHORT and "\n" not in text)
            if rank > best:
                best, asked = rank, (text or IMAGE, images)
            if all(best):
                return asked
    return asked


def samples(answered: list[Answered], count: int) -> list[Answered]:
    """`count` answers, spread evenly over all of them, as examples."""
    return [answered[i] for i in np.linspace(0, len(answered) - 1, min(count, len(answered))).astype(int)]
