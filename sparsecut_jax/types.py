"""The data structures of the program, and the letters for axes in shapes.

B  rows of a batch            T  positions of a row (text and image)
M  image slots of a row       V  views of an image: view 0 low-res, then the hi-res crops
S  pixels of a view's side    N  tokens of one view (N = h*w patches), and of one image in the LLM
C  width of the vision tower  D  width of the LLM
K  levels taken from the tower, R rows of the bank of fused levels, L layers of the LLM
A  bank rows that can enter one layer (the maximum over layers)
Q  attention heads, G KV heads, H width of a head, F hidden width of an MLP, W words of the vocabulary
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np

EMPTY_SLOT = -1
NO_TOKEN = -1  # in the tokens of a question, and wherever else an integer of `Batch.extras` says nothing


class UserError(Exception):
    """An error that the user can fix: printed as one sentence without traceback, exit code 2."""


class Exit(Exception):
    """Ends a command with a sentence and an exit code."""

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code = code


def shown(text: str) -> str:
    """Escapes control characters: names in files may hold line breaks and terminal codes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(key: str, known: Any) -> str:
    """Text "; did you mean 'x'?" for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(str(key), [str(k) for k in known], 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


CAUSES = {
    "format": "not a row in LLaVA's format",
    "text": "not valid UTF-8 or JSON",
    "roles": "turns in the wrong order or with an unknown role",
    "no_answer": "no answer",
    "no_loss": "no answer with a loss",
    "unsupported": "a video or audio file",
    "image_count": "number of <image> marks differs from the number of images",
    "too_long": "images and first answer longer than seq_len",
    "path": "an image outside of its folder",
    "remote_image": "an image given as a URL",
    "missing_image": "an image file that does not exist",
    "broken_image": "an image that cannot be decoded",
    "too_large_image": "an image of more than data.max_pixels",
}


class BadSample(UserError):
    """A row that cannot be trained on; `cause` is a key of CAUSES."""

    def __init__(self, cause: str, sentence: str):
        super().__init__(sentence)
        self.cause = cause

    def __reduce__(self):  # pickled by worker processes
        return type(self), (self.cause, str(self))


@dataclasses.dataclass(frozen=True)
class Extra:
    """An array of a batch that a way of fusing or a task reads: [B, P, ...].

    The texts of a row fill it with items in their order. What no item fills is NO_TOKEN in an array of signed integers, else 0.

    Attributes:
      shape, dtype: of an item, which may also be smaller.
      room: items of a row (P); 0: one for each image slot.
    """

    shape: tuple[int, ...]
    dtype: str
    room: int = 0


@flax.struct.dataclass
class Batch:
    """One batch. Here, two questions about one image share its encoding without seeing each other:

        tokens     <s> USER : I I I I what color ? blue </s> is it red ? no </s> _ _
        loss_mask   0   0   0 0 0 0 0  0    0    0   1    1  0  0  0  0  1   1   0 0
        segments    1   1   1 1 1 1 1  1    1    1   1    1  1  1  1  1  1   1   0 0
        branches    0   0   0 0 0 0 0  1    1    1   1    1  2  2  2  2  2   2   0 0
        positions   0   1   2 3 4 5 6  7    8    9  10   11  7  8  9 10 11  12   0 0

    A position sees itself and the earlier positions of its segment that are in branch 0 or in its own branch. An ordinary
    conversation is entirely in branch 0.

    Shapes and dtypes are those of `batch_spec`.
    """

    tokens: jax.Array  # the id at image positions is ignored
    loss_mask: jax.Array  # 1 where tokens[b, t] is a target (answers and their end tokens)
    segments: jax.Array  # 0 is padding
    branches: jax.Array | None  # None if all are 0
    positions: jax.Array  # rotary positions
    views: jax.Array  # pixels of the images, or what the tower makes of them (data/features.py)
    image_start: jax.Array  # first of an image's positions, EMPTY_SLOT if there is no image
    extras: dict[str, Any] = flax.struct.field(default_factory=dict)  # what else is read, see `Extra`
    most_segments: int = flax.struct.field(pytree_node=False, default=0)  # maximum per sequence; 0: unknown


def batch_spec(
    rows: int,
    length: int,
    slots: int,
    image_shape: tuple[int, ...],
    *,
    image_dtype: str = "uint8",
    extras: Mapping[str, Extra] | None = None,
    branched: bool = False,
    most_segments: int = 0,
    sharding: jax.sharding.Sharding | None = None,
) -> Batch:
    """The arrays of a batch as `jax.ShapeDtypeStruct`s; whatever makes a batch makes one of these shapes and dtypes.

    Args:
      rows, length, slots: B, T and M.
      image_shape, image_dtype: of an image: (V, S, S, 3), or (V, N, K * C) for features of K tower levels.
      extras: {name: what else is read}
      branched: whether any position is outside of branch 0.
      most_segments: see `Batch`.
      sharding: of every array.
    """
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
    return Batch(
        tokens=of("int32", length),
        loss_mask=of("uint8", length),
        segments=of("int32", length),
        branches=of("int32", length) if branched else None,
        positions=of("int32", length),
        views=of(image_dtype, slots, *image_shape),
        image_start=of("int32", slots),
        extras={name: of(extra.dtype, extra.room or slots, *extra.shape) for name, extra in (extras or {}).items()},
        most_segments=most_segments,
    )


def empty_batch(spec: Batch) -> Batch:
    """A batch of numpy arrays in the shapes of `spec`: padding alone, without images or items of its extras."""
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec)
    batch.image_start.fill(EMPTY_SLOT)
    for array in batch.extras.values():
        array.fill(NO_TOKEN if np.issubdtype(array.dtype, np.signedinteger) else 0)
    return batch


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and writes."""

    step: jax.Array  # int32[]; optimizer steps of the whole run, skipped ones included
    # {"vision", "fusion", "llm"}; float32 master weights of trained parameters, the others in the compute dtype
    params: dict[str, Any]
    opt_state: Any  # of the parameters that this stage trains
    skipped: jax.Array  # int32[]; updates skipped because loss or gradient was not finite
    streak: jax.Array  # int32[]; consecutive skipped updates up to this step


@dataclasses.dataclass(frozen=True)
class AskedRow:
    """A row of a test that is asked about.

    Attributes:
      test: name of the test rows, as results.json has it.
      name: the row's id, or its number where it has none.
      place: its index among the rows whose pictures are encoded together.
      row: in the format of text/conversation.py.
      images: paths of its images; None for an image that is not a file (TFDS).
    """

    test: str
    name: str
    place: int
    row: dict[str, Any]
    images: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question of a test, its reference answers and the model's; tasks may add fields.

    Attributes:
      test: name of the test rows, as results.json has it.
      row: the row's id, or its number where it has none.
      images: paths of its images; None for an image that is not a file (TFDS).
      expected: the answer of the conversation.
      references: other correct answers, from `answers` of the row.
      cut: whether the answer was cut at the maximum length.
      step: step of the checkpoint.
    """

    test: str
    row: str
    kind: str
    question: str
    images: tuple[str | None, ...]
    expected: str
    references: tuple[str, ...]
    answer: str
    cut: bool
    step: int

    @property
    def correct(self) -> bool:
        """Whether the answer equals a correct answer exactly."""
        return self.answer == self.expected or self.answer in self.references
