"""Scenes: generated pictures, and questions that separate the effects of tower levels and of views.

The questions cross two factors, so that neither stands in for the other:

    level   low: direction of lines, color, sharpness, grain     high: what it is, how many, where
    scale   coarse: visible in the low-res view                  fine: visible only in the hi-res crops

Pictures 2k and 2k + 1 form a pair: they are alike except for the answers, all of which differ. The answers to a question
are equally frequent and independent of those to other questions, with one exception: in each of the four cells the first
two questions are coupled. Combinations of their answers (a, b), counted from 0, with a + b divisible by 4 never occur in
"train" and "test", and only these occur in "heldout", the second half of the test pictures. The coupling stays within a
cell, so coarse answers say nothing about fine ones, nor low levels about high ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from sparsecut_jax.data.scenes_drawing import Facts, draw
from sparsecut_jax.settings import ScenesConfig
from sparsecut_jax.text.conversation import GPT, HUMAN, IMAGE
from sparsecut_jax.types import UserError

Row = dict[str, Any]
LEVELS, SCALES = ("low", "high"), ("coarse", "fine")
PARTS = ("train", "test", "heldout")
DIRECTIONS, COLORS, COUNTS = (
    ("horizontal", "vertical", "rising", "falling"),
    ("red", "green", "blue", "yellow"),
    ("1", "2", "3", "4"),
)


@dataclasses.dataclass(frozen=True)
class Template:
    """A question and its possible answers."""

    name: str
    level: Literal["low", "high"]
    scale: Literal["coarse", "fine"]
    question: str
    answers: tuple[str, ...]

    @property
    def kind(self) -> str:
        return f"{self.level}_{self.scale}_{self.name}"


TEMPLATES = tuple(
    Template(*row)
    for row in [
        ("stripes", "low", "coarse", "which way do the wide stripes run?", DIRECTIONS),
        ("color", "low", "coarse", "what color is the big shape?", COLORS),
        ("edge", "low", "coarse", "is the edge of the big shape sharp or blurred?", ("sharp", "blurred")),
        ("shape", "high", "coarse", "what is the big shape?", ("circle", "square", "triangle", "cross")),
        ("discs", "high", "coarse", "how many white discs are there?", COUNTS),
        (
            "box",
            "high",
            "coarse",
            "on which side of the big shape is the black box?",
            ("left", "right", "above", "below"),
        ),
        ("lines", "low", "fine", "which way do the fine lines run?", DIRECTIONS),
        ("dots", "low", "fine", "what color are the tiny dots?", COLORS),
        ("grain", "low", "fine", "is the grainy patch made of checks or specks?", ("checks", "specks")),
        ("letter", "high", "fine", "which letter is written?", ("A", "K", "S", "X")),
        ("marks", "high", "fine", "how many tiny crosses are there?", COUNTS),
        ("order", "high", "fine", "is the letter left or right of the digit?", ("left", "right")),
    ]
)
CELL = 3  # templates per cell, of which the first two are coupled
PAIRS_PER_BLOCK = 84  # pairs in which every pair of answers and every combination occurs equally often


def rows(cfg: ScenesConfig, split: Literal["train", "test"], size: int, low: int) -> Scenes:
    """The rows of a split, with their pictures.

    Args:
      cfg: checked settings.
      split: "train" or "test"; the latter includes the held-out combinations.
      size: side of a picture in pixels if `cfg.size` is 0.
      low: side of the low-res view in pixels, in which fine details are invisible.

    Raises:
      UserError: the pictures or the low-res view are too small for fine details.
    """
    size = cfg.size or size
    if size < 2 * low:
        raise UserError(
            f"config.data.scenes.size={size}: expected at least {2 * low}, twice the low-res view of {low} pixels, "
            "because fine details must show in the hi-res crops and not in the low-res view"
        )
    if low < 32:
        raise UserError(f"pictures of scenes need low-res views of at least 32 pixels, got {low}")
    asked = tuple(i for i, t in enumerate(TEMPLATES) if t.level in cfg.levels and t.scale in cfg.scales)
    if split == "train":
        return Scenes(cfg.seed, size, low, asked, range(cfg.train))
    heldout = cfg.test // 4 * 2
    return Scenes(cfg.seed, size, low, asked, range(cfg.test), first_heldout=cfg.test - heldout)


def captions(rows: Sequence[Row]) -> Captions:
    """A caption row for each row, with the coarse content of its picture: "a sharp red circle on rising stripes, ..."."""
    return Captions(rows)


@dataclasses.dataclass(frozen=True)
class Captions(Sequence):
    """Caption rows for `rows`, which are Scenes or a part of them."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        row = self.rows[i]
        turns = [{"from": HUMAN, "value": IMAGE}, {"from": GPT, "value": row["caption"]}]
        return {"id": row["id"] + "/caption", "image": row["image"], "conversations": turns}


@dataclasses.dataclass(frozen=True)
class Scenes(Sequence):
    """Rows in LLaVA's format, generated on demand; a slice is a Scenes too.

    Attributes:
      seed: of the pictures and answers.
      size, low: sides of a picture and of its low-res view in pixels.
      asked: indices into TEMPLATES of the questions.
      indices: numbers of the pictures within the split.
      first_heldout: index of the first test picture with held-out combinations; -1 for the training split.
    """

    seed: int
    size: int
    low: int
    asked: tuple[int, ...]
    indices: range
    first_heldout: int = -1

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int | slice) -> Row | Scenes:
        if isinstance(i, slice):
            return dataclasses.replace(self, indices=self.indices[i])
        name = self.name(self.indices[i])
        answers = self.answers(name)
        turns = []
        for k in self.asked:
            template = TEMPLATES[k]
            kind = "heldout_" + template.kind if name.startswith("heldout") else template.kind
            turns.append({"from": HUMAN, "value": (IMAGE if not turns else "") + "\n" + template.question})
            turns.append({"from": GPT, "value": template.answers[answers[k]], "kind": kind})
        caption = _caption(_facts(answers))
        return {"id": name, "image": name, "independent": True, "caption": caption, "conversations": turns}

    def name(self, index: int) -> str:
        """Name of a picture of the split: "train/17", "test/17" or "heldout/17"."""
        if self.first_heldout < 0:
            return f"train/{index}"
        before = index < self.first_heldout
        return f"test/{index}" if before else f"heldout/{index - self.first_heldout}"

    def answers(self, name: str) -> np.ndarray:
        """int8[len(TEMPLATES)]: index of the right answer to each template for a picture."""
        part, index = _split_name(name)
        pair, member = divmod(index, 2)
        block, k = divmod(pair, PAIRS_PER_BLOCK)
        return _block(self.seed, part, block)[k, member]

    def open(self, name: str, fine: bool = True) -> Image.Image:
        """The RGB picture of that name. `fine=False` omits what only the hi-res crops show."""
        part, index = _split_name(name)
        seed = (self.seed, PARTS.index(part), index // 2)  # the two pictures of a pair share everything but the answers
        return Image.fromarray(draw(_facts(self.answers(name)), seed, self.size, self.low, fine))


@functools.lru_cache(maxsize=1024)
def _block(seed: int, part: str, block: int) -> np.ndarray:
    """int8[PAIRS_PER_BLOCK, 2, len(TEMPLATES)]: answers of the pairs of a block.

    Every pair of different answers to a question occurs equally often, in an order of its own for each question.
    """
    rng = np.random.default_rng((seed, PARTS.index(part), block, 3))  # drawing uses 0, 1 and 2 in the last place
    columns = []
    for cell in range(0, len(TEMPLATES), CELL):
        couples = _couples(heldout=part == "heldout")
        columns.append(rng.permutation(np.tile(couples, (PAIRS_PER_BLOCK // len(couples), 1, 1))))
        free = np.array(list(itertools.permutations(range(len(TEMPLATES[cell + 2].answers)), 2)))
        columns.append(rng.permutation(np.tile(free, (PAIRS_PER_BLOCK // len(free), 1)))[:, :, None])
    return np.concatenate(columns, axis=2).astype(np.int8)


@functools.cache
def _couples(heldout: bool) -> np.ndarray:
    """int[P, 2, 2]: all ((a, b), (a', b')) with a != a' and b != b'; both sums are divisible by 4 iff `heldout`."""
    allowed = [(a, b) for a in range(4) for b in range(4) if ((a + b) % 4 == 0) == heldout]
    return np.array([(p, q) for p in allowed for q in allowed if p[0] != q[0] and p[1] != q[1]])


def _facts(answers: np.ndarray) -> Facts:
    return {template.name: template.answers[k] for template, k in zip(TEMPLATES, answers, strict=True)}


def _caption(facts: Facts) -> str:
    where = {"left": "to the left", "right": "to the right"}.get(facts["box"], facts["box"])
    discs = "1 white disc" if facts["discs"] == "1" else f"{facts['discs']} white discs"
    shape = f"a {facts['edge']} {facts['color']} {facts['shape']}"
    return f"{shape} on {facts['stripes']} stripes, a black box {where}, {discs}"


def _split_name(name: str) -> tuple[str, int]:
    part, _, index = name.partition("/")
    if part not in PARTS or not index.isdecimal():
        raise UserError(f"scenes have no picture {name!r}; expected train/17, test/17 or heldout/17")
    return part, int(index)
