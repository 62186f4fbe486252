"""The contract of the seam: what a way of fusing and a way of injecting are given, and what they return.

A way of fusing is a file `models/fusing/NAME.py`, found by its name (models/ways.py). It has

    class Settings            optional frozen dataclass: the settings of the group `config.fusion.NAME`
    IGNORES                   optional: beginnings of settings that have no effect with it, such as ("shortcuts.",)
    RULES                     optional: names of its tensors in foreign files (models/rules.py)
    OFFICIAL                  optional: its `mm_projector_type` in LLaVA's and SparseCut's own files
    OF_WEIGHTS                optional: settings besides its name that its weights are made for, such as ("fusion.grid",)
    others(settings) -> names optional: other ways whose settings it reads, too
    portable(settings, wiring) -> settings    optional: its settings for an exported model, whose tower may be shallower
    check(settings, cfg)      optional: raises UserError for values that can never work
    sharded_sizes(settings, cfg) -> {text: size}    optional: sizes that mesh axis tensor must divide, by how errors
                              name them, such as "config.vision.width // 64"
    wiring(settings, cfg)     -> Wiring; raises UserError if it cannot be
    class Fuse(Fusing)        the module

A way of injecting is a file `models/injecting/NAME.py` with functions of one layer, all but `in_decode` optional:

    in_decode: bool           whether tokens that are generated look at the sources, too
    class Settings            the settings of the group `config.injecting.NAME`
    weights(module, sites, llm) -> {name: [J, ...]}     parameters, one row for every layer that has sources
    before(settings, x, here) -> x, ratio               x: [B, T, D], the layer's input
    memory(settings, keys, values, here) -> tree        computed once per image, found as `here.memory` by the others, and
                                                kept beside the KV cache in generation
    attend(settings, q, here) -> [B, T, Q, H]           added to attention's output, before its output matrix
    after(settings, x, here) -> x, ratio                x: the layer's output

`keys(x[B, S, D])` and `values(x)` give [B, S, G, H] by the layer's own matrices, not rotated; G may be Q where devices hold
copies of KV heads (llm.replicate_kv). They are None for ways that do not attend. `ratio` is float32[A], the norm of what was
added over the norm of what was there, for every entry of the layer's route; or None. Functions of a way with weights run only
in layers that have sources, in a branch, so they can neither make parameters nor draw random numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparsecut_jax.models.shortcuts import Shortcuts
from sparsecut_jax.settings import FusionConfig


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What a way of fusing reads, and where what it makes goes. Numbers only.

    Attributes:
      levels: blocks of the tower whose outputs it reads, in the order of `Seen.levels`; -1 is the first block's input.
      positions: positions of an image in the LLM (S).
      entering: for each layer of the LLM, the sources (rows of the bank) that enter it.
      names: a name for each of the R sources, such as "vit3".
      grid: rows and columns of the hi-res crops; None: it reads the low-res view alone.
      question: positions of the question (Tq) that it reads, which costs an encoding per question; 0: it reads none.
      injecting: the way of injecting, a file in models/injecting.
      position: with "add", before ("pre") or after ("post") the layer.
      shortcuts: the pairs that it follows, if its sources are tower levels.
      hidden: channels between the projector's matrices; 0: the LLM's width, as in LLaVA.
    """

    levels: tuple[int, ...]
    positions: int
    entering: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = ()
    grid: tuple[int, ...] | None = None
    question: int = 0
    injecting: str = "add"
    position: str = "pre"
    shortcuts: Shortcuts | None = None
    hidden: int = 0

    @property
    def route(self) -> np.ndarray:
        """int32[L, A], A >= 1: rows of the bank that enter each layer, -1 for none."""
        widest = max(1, *map(len, self.entering))
        return np.array([(*rows, *[-1] * (widest - len(rows))) for rows in self.entering], np.int32)

    @property
    def sites(self) -> np.ndarray:
        """int32[L]: number of each layer among the J that have sources, -1 for the others."""
        has = np.array([bool(rows) for rows in self.entering])
        return np.where(has, np.cumsum(has) - 1, -1).astype(np.int32)

    @property
    def site_count(self) -> int:
        """Layers that have sources (J)."""
        return sum(map(bool, self.entering))


@flax.struct.dataclass
class Seen:
    """Outputs of the tower.

    levels: [K, I, V, N, C] for I images: the blocks of `Wiring.levels`, view 0 low-res, then the crops in row-major order.
    slots: image slots of a row (M), which I is a multiple of.
    """

    levels: jax.Array
    slots: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class Question:
    """The question that is asked about each of I images.

    there: bool[I, Tq], which positions hold a token.
    words: [I, Tq, D], the LLM's word embeddings, through which no gradient flows.
    """

    there: jax.Array
    words: jax.Array


@flax.struct.dataclass
class Fused:
    """What a way of fusing makes. The axis of images, I, may be split into rows and slots, [B, M].

    tokens: [I, S, D], for the image's positions at the LLM's input.
    bank: [R, I, Sr, D], the sources that are injected; None if there are none. With "add", Sr = S.
    aux_loss: float32[], a loss of its own, added to the mean loss of a batch.
    """

    tokens: jax.Array
    bank: jax.Array | None = None
    aux_loss: jax.Array | float = 0.0


class Fusing(nn.Module):
    """Base of every `Fuse`: `__call__(seen: Seen, question: Question | None) -> Fused`.

    Attributes:
      settings: the way's own, `config.fusion.NAME`; None if it has none.
      config: what all ways share, `config.fusion`; each applies its `remat` to its modules (models/remat.py).
      wiring: what it reads and makes.
      width: of the LLM (D).
      attention: backend, see models/attention.py.
    """

    settings: Any
    config: FusionConfig
    wiring: Wiring
    width: int
    attention: str = "xla"


@flax.struct.dataclass
class Sources:
    """What the layers inject, for T positions of B rows.

    bank: [R, B, M, Sr, D]; None in generation after the prompt, where `memory` has what is needed.
    image_start: int32[B, M], first position of each image, -1 for an empty slot.
    own: bool[B, T, M], whether image m belongs to the text of position t (its row and segment).
    after: bool[B, T, M], whether position t of that text stands behind image m.
    weights: {name: [J, ...]} of the way of injecting.
    first: int32[], where in the row the T positions begin; None: at its start, and they are all of it.
    """

    bank: jax.Array | None
    image_start: jax.Array
    own: jax.Array | None = None
    after: jax.Array | None = None
    weights: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    first: jax.Array | None = None


@flax.struct.dataclass
class Here:
    """`Sources` in one layer.

    rows: int32[A], rows of the bank that enter the layer, -1 for none.
    memory: what the way of injecting keeps of the sources; generation has it too.
    weights: {name: [...]}, the layer's row of the weights.
    position: "pre" or "post", see Wiring.
    """

    bank: jax.Array | None
    rows: jax.Array
    image_start: jax.Array
    own: jax.Array | None
    after: jax.Array | None
    weights: dict[str, jax.Array]
    first: jax.Array | None
    memory: Any = None
    position: str = flax.struct.field(pytree_node=False, default="pre")

    def source(self, place: int) -> jax.Array:
        """[B, M, Sr, D], the source at `place` of the layer's route; zeros if there is none."""
        return jnp.where(self.rows[place] >= 0, self.bank[jnp.maximum(self.rows[place], 0)], 0)
