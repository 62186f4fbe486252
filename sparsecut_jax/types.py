"""What flows through the program, and the letters its shapes are written in.

B  rows of a batch            T  positions of a row (text and image)
M  image slots of a row       V  views of an image: view 0 low-res, then the hi-res crops
S  pixels of a view's side    N  tokens of one view (N = h*w patches), and of one image in the LLM
C  width of the vision tower  D  width of the LLM
K  levels taken from the tower, R rows of the bank of injection sources, L layers of the LLM
A  sources that may enter one layer
Q  attention heads, G KV heads, H width of a head, F hidden width of an MLP, W words of the vocabulary
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

PADDING_SEGMENT = 0
EMPTY_SLOT = -1


class UserError(Exception):
    """Something the user can mend: printed as one sentence, exit code 2."""


CAUSES = {
    "format": "no row in LLaVA's format",
    "text": "text that is no UTF-8 or JSON",
    "roles": "turns in a wrong order or of an unknown role",
    "no_answer": "no answer",
    "no_loss": "no answer that is trained on",
    "unsupported": "a video or an audio",
    "image_count": "<image> marks that do not match the images",
    "too_long": "images and first answer longer than seq_len",
    "path": "an image outside of its folder",
    "remote_image": "an image given by a URL",
    "missing_image": "an image that is not there",
    "broken_image": "an image that cannot be decoded",
    "too_large_image": "an image of more than data.max_pixels",
}


class BadSample(UserError):
    """A row that cannot be trained on; `cause` is a key of CAUSES."""

    def __init__(self, cause: str, sentence: str):
        super().__init__(sentence)
        self.cause = cause

    def __reduce__(self):  # it crosses from worker processes
        return type(self), (self.cause, str(self))


@flax.struct.dataclass
class Batch:
    """One batch. Three questions about one image, sharing its encoding without seeing one another:

        tokens     <s> USER : I I I I what color ? blue </s> is it red ? no </s> _ _
        loss_mask   0   0   0 0 0 0 0  0    0    0   1    1  0  0  0  0  1   1   0 0
        segments    1   1   1 1 1 1 1  1    1    1   1    1  1  1  1  1  1   1   0 0
        branches    0   0   0 0 0 0 0  1    1    1   1    1  2  2  2  2  2   2   0 0
        positions   0   1   2 3 4 5 6  7    8    9  10   11  7  8  9 10 11  12   0 0

    A position sees the earlier positions of its own segment that are in branch 0 or in its own branch.
    An ordinary conversation is all branch 0.
    """

    tokens: jax.Array  # int32[B, T]; the id at image positions is ignored
    loss_mask: jax.Array  # uint8[B, T]; 1 where tokens[b, t] is to be predicted (answers and their end token)
    segments: jax.Array  # int32[B, T]; 0 padding
    branches: jax.Array | None  # int32[B, T]; None where all of them are 0
    positions: jax.Array  # int32[B, T]; rotary position
    views: jax.Array  # uint8[B, M, V, S, S, 3]
    image_start: jax.Array  # int32[B, M]; first of N image positions, -1 where the slot is empty
    extras: dict[str, Any] = flax.struct.field(default_factory=dict)  # named arrays that some fusion may need
    most_segments: int = flax.struct.field(pytree_node=False, default=0)  # of a sequence, at most; 0: not known


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes."""

    step: jax.Array  # int32[]; optimizer steps of the whole run, skipped ones included
    # {"vision", "fusion", "llm"}; float32 masters of what is trained, the rest as it is computed
    params: dict[str, Any]
    opt_state: Any  # of the trainable parameters of this stage only
    skipped: jax.Array  # int32[]; updates left out because loss or gradient was not finite
    streak: jax.Array  # int32[]; how many of the latest updates in a row were left out
