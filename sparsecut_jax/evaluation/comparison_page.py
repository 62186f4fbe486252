"""A comparison as one HTML file: scores, curves, and the answers that differ or are wrong, with their images."""

from __future__ import annotations

import base64
import collections
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from sparsecut_jax import config as config_lib
from sparsecut_jax.data import sources
from sparsecut_jax.data.images import read_image
from sparsecut_jax.data.parts import Part
from sparsecut_jax.evaluation.comparison import Finished, Key, Line
from sparsecut_jax.tasks.answers import SCORES, scores_of
from sparsecut_jax.text.conversation import images_of
from sparsecut_jax.types import Answered, BadSample, UserError

SIDE, MAX_PIXELS = 320, 50_000_000  # of a picture on the page; of one in a file
TEMPLATE = Path(__file__).with_name("comparison.html")


@dataclasses.dataclass(frozen=True)
class Said:
    """A run's answer. mark: "right", "wrong", or "rouge" for a long one, with its ROUGE-L in `rouge`."""

    run: int
    answer: str
    mark: str
    rouge: float
    cut: bool


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question on the page; `others` are references beside the expected answer."""

    question: str
    kind: str
    expected: str
    others: list[str]
    said: list[Said]


@dataclasses.dataclass(frozen=True)
class Card:
    """The questions about one row's pictures, which are data URLs; None for one that cannot be shown."""

    test: str
    row: str
    pictures: list[str | None]
    asked: list[Asked]


def page(
    runs: Sequence[Finished],
    settings: dict[str, list[str]],
    lines: Sequence[Line],
    notes: Sequence[str],
    curves: str,
    limit: int,
) -> str:
    """The HTML. curves: the PNG of the loss curves, if it exists; limit: maximum number of questions shown."""
    keys = interesting(runs)
    chosen = pick(keys, limit)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    curve = None
    if os.path.exists(curves):
        with open(curves, "rb") as file:
            curve = base64.b64encode(file.read()).decode()
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        names=[run.name for run in runs],
        settings=settings,
        lines=lines,
        titles=SCORES,
        notes=notes,
        curve=curve,
        tally=tally(runs),
        cards=cards(runs, chosen),
        shown=len(chosen),
        count=len(keys),
        asked=len({key for run in runs for key in run.answers}),
    )


def value(item: Answered) -> float:
    """ROUGE-L of a long answer, else 1 where it is right after normalization and 0 where not."""
    scores = scores_of(item)
    return scores.get("rouge_l", scores["normalized_accuracy"])


def interesting(runs: Sequence[Finished]) -> dict[Key, float]:
    """Questions that a run answered wrong, or runs differently: by how much their values differ, from 0 to 1."""
    spreads = {}
    for key in dict.fromkeys(key for run in runs for key in run.answers):
        items = [run.answers[key] for run in runs if key in run.answers]
        values = [value(item) for item in items]
        if min(values) < 1 or len({item.answer for item in items}) > 1:
            spreads[key] = max(values) - min(values)
    return spreads


def pick(keys: dict[Key, float], limit: int) -> list[Key]:
    """The `limit` questions on which runs differ most, in their own order; ties are broken by a fixed random choice."""
    order = list(keys)
    shuffled = np.random.default_rng(0).permutation(len(order))
    best = sorted(shuffled, key=lambda i: -keys[order[i]])[:limit]
    return [order[i] for i in sorted(best)]


def tally(runs: Sequence[Finished]) -> list[tuple[list[str], int]]:
    """(a mark for every run, number of questions), over those that all runs were asked, most frequent first.

    Long answers are left out, since they rarely match exactly.
    """
    common = [
        key
        for key, item in runs[0].answers.items()
        if "rouge_l" not in scores_of(item) and all(key in run.answers for run in runs)
    ]
    marks = [tuple(_said(i, run.answers[key]).mark for i, run in enumerate(runs)) for key in common]
    return [(list(key), n) for key, n in collections.Counter(marks).most_common()]


def cards(runs: Sequence[Finished], keys: Sequence[Key]) -> list[Card]:
    opened, cards_by_row = Pictures(runs), {}
    for key in keys:
        items = {i: run.answers[key] for i, run in enumerate(runs) if key in run.answers}
        first = next(iter(items.values()))
        at = (first.test, first.row)
        if at not in cards_by_row:
            cards_by_row[at] = Card(first.test, first.row, opened.of(first), [])
        others = [text for text in dict.fromkeys(first.references) if text != first.expected]
        said = [_said(i, item) for i, item in items.items()]
        cards_by_row[at].asked.append(Asked(first.question, first.kind, first.expected, others, said))
    return list(cards_by_row.values())


def _said(run: int, item: Answered) -> Said:
    long, good = "rouge_l" in scores_of(item), value(item)
    mark = "right" if good == 1 else "rouge" if long else "wrong"
    return Said(run, item.answer, mark, good if mark == "rouge" else 0.0, item.cut)


class Pictures:
    """Thumbnails for the page. Images that are not files come from the test rows that a run's config names."""

    def __init__(self, runs: Sequence[Finished]):
        self.runs = runs
        self.known: dict[str, str | None] = {}  # by path
        self.parts: dict[str, tuple[Part, dict[str, int]]] | None = None  # of a test, and the places of its rows

    def of(self, item: Answered) -> list[str | None]:
        """Data URLs of an item's images; None for one that cannot be opened."""
        return [self._file(path) if path else self._of_row(item, m) for m, path in enumerate(item.images)]

    def _file(self, path: str) -> str | None:
        if path not in self.known:
            try:
                self.known[path] = small(read_image(path, MAX_PIXELS))
            except (BadSample, OSError):
                self.known[path] = None
        return self.known[path]

    def _of_row(self, item: Answered, m: int) -> str | None:
        if self.parts is None:
            self.parts = {}
            for run in self.runs:
                self._open(run)
        part, places = self.parts.get(item.test, (None, {}))
        if item.row not in places:
            return None
        try:
            return small(part.pictures.open(images_of(part.row(places[item.row]))[m]))
        except (BadSample, IndexError):
            return None

    def _open(self, run: Finished) -> None:
        """Adds the tests of a run, if its data still exist."""
        try:
            tests = sources.open_tests(config_lib.check(run.config))
        except UserError:
            return
        for name, part in tests.items():
            if name in self.parts:
                continue
            places = {}
            for i in range(len(part)):
                try:
                    places.setdefault(str(part.row(i).get("id", part.number(i))), i)
                except BadSample:
                    continue
            self.parts[name] = part, places


def small(picture: Image.Image) -> str:
    """A picture as the data URL of a JPEG of at most SIDE pixels a side."""
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
