"""What the model keeps between forward and backward pass, read off JAX's own differentiation by shapes alone.

The real model is traced, in two halves: from pixels to fused images, and from embeddings to the decoder's last layer. So
remat policies, attention backends, frozen weights and any way of fusing count as they do in the real step. Nothing is
compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsecut_jax.data.batches import slots_of, spec_of
from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.models.sparsecut import Encoded, SparseCut
from sparsecut_jax.planning.jaxprs import results
from sparsecut_jax.runtime import backends
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch

# cuDNN's function queries the GPU, so splash stands in for it: it keeps arrays of the same shapes.
TRACED = {"cudnn": "splash"}


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that are kept: `each` per sequence, and `copies` of weights in the compute dtype."""

    each: float
    copies: float

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.each + other.each, self.copies + other.copies)

    def __sub__(self, other: Kept) -> Kept:
        return Kept(self.each - other.each, self.copies - other.copies)


class Residuals:
    """What a stage keeps, with the heads and hidden units of the model sharded `tensor` ways.

    cfg: with no "auto" settings left.
    """

    def __init__(self, cfg: Config, name: str, tensor: int = 1):
        self.cfg, self.bare, self.stage, self.tensor = cfg, backends.without_remat(cfg), cfg.stages[name], tensor
        self.drops = bool(cfg.lora.rank and cfg.lora.dropout)
        self._sequence = lambda length: _flat(spec_of(cfg, 1, length, slots_of(cfg, name), most_segments=1))

    @functools.cached_property
    def bank(self) -> float:
        """Bytes of a sequence's bank of fused images, which the layers of the decoder read."""
        return float(sum(map(_size, jax.tree.leaves(self._sources))))

    @functools.cached_property
    def decoder(self) -> Kept:
        """By the layers of the LLM."""
        remat = self.cfg.llm.remat
        return Kept(0.0, 0.0) if remat == "offload" else self._decoder(remat, stacked=True)  # to the host

    @functools.cached_property
    def layer(self) -> float:
        """Bytes per sequence that a layer of the LLM makes for the backward pass, with what is the same in all layers."""
        whole, layers = self._decoder("none"), self._decoder("none", stacked=True)
        outside = self._decoder("full") - self._decoder("full", stacked=True)
        return (whole - layers - outside).each + layers.each / self.cfg.llm.layers

    @functools.cached_property
    def encoder(self) -> Kept:
        """By the blocks of the tower and the fusion."""
        remat = self.cfg.vision.remat
        fusion = self._encoder(_encode, remat, 1) - self._encoder(_see, remat, 1)
        return fusion + self._encoder(_see, remat, self.tensor, stacked=True) if self._sees else fusion

    @functools.cached_property
    def block(self) -> float:
        """Bytes per sequence that a block of the tower makes for the backward pass."""
        return self._encoder(_see, "none", self.tensor, stacked=True).each / self._depth if self._sees else 0.0

    @property
    def _sees(self) -> bool:
        """Whether the tower is run, rather than its stored outputs read."""
        return self.cfg.data.cache_features == "none"

    @functools.cached_property
    def _depth(self) -> int:
        """Blocks of the tower that the model has."""
        boxes = _parameters(_model(self.bare), _see, *self._sequence(1), None).values()
        return next(box.value.shape[box.names.index("layers")] for box in boxes if "layers" in box.names)

    @functools.cached_property
    def _sources(self) -> jax.ShapeDtypeStruct | None:
        return _bank(_model(self.bare), *self._sequence(1))

    # The half that is not looked at has settings that do not change, so that each half is traced as seldom as possible.

    def _decoder(self, remat: str, stacked: bool = False) -> Kept:
        llm, n = self.cfg.llm, self.tensor
        local = dict(heads=llm.heads // n, kv_heads=max(1, llm.kv_heads // n), mlp_dim=llm.mlp_dim // n)
        model = _model(dataclasses.replace(self.bare, llm=dataclasses.replace(llm, remat=remat, **local)))
        inputs = (*self._sequence(self.stage.seq_len), self._sources)
        return _kept(model, _decode, self.stage.trainable, self.drops, *inputs, llm.layers if stacked else 0)

    def _encoder(self, half: Callable, remat: str, tensor: int, stacked: bool = False) -> Kept:
        vision = dataclasses.replace(self.cfg.vision, remat=remat, mlp_dim=self.cfg.vision.mlp_dim // tensor)
        model = _model(dataclasses.replace(self.cfg, vision=vision, llm=self.bare.llm))
        inputs = (*self._sequence(1), None)
        return _kept(model, half, self.stage.trainable, self.drops, *inputs, self._depth if stacked else 0)


# --- the halves of the model, each a function of (model, inputs, what exists anyway) ---


def _decode(model: SparseCut, inputs: tuple[jax.Array, jax.Array | None], batch: Batch) -> jax.Array:
    x, bank = inputs
    sight = Packed(batch.segments, None, batch.positions, 1)
    sources = model.sources(Encoded(x, bank, 0.0), batch.image_start, batch.segments)
    return model.llm(x, batch.positions, sight, sources)[0]


def _encode(model: SparseCut, inputs: tuple[()], batch: Batch) -> tuple:
    encoded = model.encode(batch.views, batch.extras.get("question"))
    return encoded.tokens, encoded.bank


def _see(model: SparseCut, inputs: tuple[()], batch: Batch) -> jax.Array:
    return model.levels(batch.views)


# --- tracing ---


def _model(cfg: Config) -> SparseCut:
    attention = TRACED.get(cfg.attention, cfg.attention)
    return build_model(dataclasses.replace(cfg, attention=attention), jnp.dtype(cfg.dtype))


def _flat(batch: Batch) -> tuple[tuple, Any]:
    """Leaves and structure of a batch, which itself cannot be hashed."""
    leaves, structure = jax.tree.flatten(batch)
    return tuple(leaves), structure


def _inputs(model: SparseCut, half: Callable, batch: Batch, bank: jax.ShapeDtypeStruct | None) -> tuple:
    """Shapes of a half's inputs for a batch. bank: [R, B, M, S, D], if anything is injected."""
    x = jax.ShapeDtypeStruct((*batch.tokens.shape, model.llm_config.width), model.dtype)
    return (x, bank) if half is _decode else ()


@functools.lru_cache(maxsize=64)
def _boxed(model: SparseCut, half: Callable, leaves: tuple, structure: Any, bank: Any) -> dict[str, Any]:
    """{path: shape and logical axes} of the parameters that a half uses, see `_inputs`."""
    batch = jax.tree.unflatten(structure, leaves)
    init = functools.partial(model.init, method=half)
    return flatten(jax.eval_shape(init, jax.random.key(0), _inputs(model, half, batch, bank), batch).get("params", {}))


def _parameters(model: SparseCut, half: Callable, *inputs: Any) -> dict[str, Any]:
    """`_boxed`, which is the same for every remat policy."""
    bare = {
        part: dataclasses.replace(getattr(model, part), remat="none")
        for part in ("vision_config", "fusion_config", "llm_config")
    }
    return _boxed(model.clone(attention="xla", dtype=jnp.float32, **bare), half, *inputs)


@functools.lru_cache(maxsize=64)
def _bank(model: SparseCut, leaves: tuple, structure: Any) -> jax.ShapeDtypeStruct | None:
    """[R, B, M, S, D], the sources of one sequence."""
    encode = lambda params, batch: model.apply({"params": params}, (), batch, method=_encode)
    params = {path: box.unbox() for path, box in _parameters(model, _encode, leaves, structure, None).items()}
    return jax.eval_shape(encode, unflatten(params), jax.tree.unflatten(structure, leaves))[1]


def _kept(model: SparseCut, *inputs: Any) -> Kept:
    """What a half of the model keeps.

    inputs: those of `_new`, and `stacked`: count only what so many layers keep. What is outside, as norms before and after
    them, XLA computes again. 0: count all.
    """
    *inputs, stacked = inputs
    leaves = [entry for entry in _new(model, *inputs) if not stacked or entry[0].shape[:1] == (stacked,)]
    each, copies = (float(sum(_size(leaf) for leaf, grows in leaves if grows == which)) for which in (True, False))
    return Kept(each / _rows(model), copies)


def _rows(model: SparseCut) -> int:
    """Sequences that are traced: so many that no axis of them is as long as a stack of layers."""
    return max(model.llm_config.layers, model.vision_config.layers) + 1


@functools.lru_cache(maxsize=256)
def _new(
    model: SparseCut,
    half: Callable,
    trainable: tuple[str, ...],
    drops: bool,
    leaves: tuple,
    structure: Any,
    bank: jax.ShapeDtypeStruct | None,
) -> list[tuple[jax.ShapeDtypeStruct, bool]]:
    """What the backward pass of half(model, inputs, batch) needs for `_rows` sequences, other than what exists anyway, and
    whether it grows with them.

    Args:
      trainable: patterns of the parameters that are trained; drops: whether adapters drop inputs.
      leaves, structure: the batch of one sequence; bank: see `_inputs`.
    """
    of, rows = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype), _rows(model)
    params = {path: box.unbox() for path, box in _parameters(model, half, leaves, structure, bank).items()}
    moving = {path: leaf for path, leaf in params.items() if any(re.fullmatch(pattern, path) for pattern in trainable)}
    frozen = {
        path: of(model.dtype if leaf.ndim > 1 else leaf.dtype, *leaf.shape)
        for path, leaf in params.items()
        if path not in moving
    }
    batch = jax.tree.unflatten(structure, [of(leaf.dtype, rows, *leaf.shape[1:]) for leaf in leaves])
    bank = bank and of(bank.dtype, bank.shape[0], rows, *bank.shape[2:])

    def backward(moving: dict, frozen: dict, batch: Batch, inputs: tuple) -> Any:
        rngs = {"dropout": jax.random.key(0)} if drops else {}
        variables = lambda moving: {"params": unflatten({**frozen, **moving})}
        run = lambda moving, inputs: model.apply(variables(moving), inputs, batch, rngs=rngs, method=half)
        return jax.vjp(run, moving, inputs)[1]

    signature = lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype))
    existing = collections.Counter(map(signature, jax.tree.leaves((moving, frozen, bank, batch))))
    new = []
    for leaf, grows in results(backward, moving, frozen, batch, _inputs(model, half, batch, bank)):
        if math.prod(leaf.shape) == 0 or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        if existing[signature(leaf)]:
            existing[signature(leaf)] -= 1
        else:
            new.append((leaf, grows))
    return new


def _size(leaf: Any) -> int:
    """Bytes of an array."""
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
