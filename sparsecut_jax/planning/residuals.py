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
from flax import linen as nn

from sparsecut_jax.data.batches import spec_of
from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.models.sparsecut import Encoded, SparseCut
from sparsecut_jax.planning.flops import slots_of
from sparsecut_jax.runs.parameters import boxed_shapes
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


def decoder(cfg: Config, name: str, seq_len: int, tensor: int = 1, remat: str = "") -> Kept:
    """What the decoder's layers keep per sequence in stage `name`, their heads and hidden units sharded `tensor` ways.

    cfg: with no "auto" settings left. remat: a policy other than the config's.
    """
    policy = remat or cfg.llm.remat
    if policy == "offload":  # to the host
        return Kept(0.0, 0.0)
    return _kept(_with_llm(cfg, tensor, policy), name, seq_len, _decode, stacked=cfg.llm.layers)


def layer(cfg: Config, name: str, seq_len: int, tensor: int = 1) -> Kept:
    """What a layer of the decoder makes per sequence for the backward pass, with what is the same in all layers."""
    layers = cfg.llm.layers
    kept = lambda remat, **which: _kept(_with_llm(cfg, tensor, remat), name, seq_len, _decode, **which)
    all_layers, outside = kept("none", stacked=layers), kept("full") - kept("full", stacked=layers)
    shared = kept("none") - all_layers - outside
    return shared + Kept(all_layers.each / layers, all_layers.copies / layers)


def encoder(cfg: Config, name: str, tensor: int = 1) -> Kept:
    """What the tower's blocks and the fusion keep per sequence."""
    one = _with_vision(cfg, 1, cfg.vision.remat)
    fusion = _kept(one, name, 1, _encode) - _kept(one, name, 1, _see)
    return fusion + _kept(_with_vision(cfg, tensor, cfg.vision.remat), name, 1, _see, stacked=_depth(cfg))


def block(cfg: Config, name: str, tensor: int = 1) -> Kept:
    """What a block of the tower keeps per sequence if nothing is computed again."""
    depth = _depth(cfg)
    blocks = _kept(_with_vision(cfg, tensor, "none"), name, 1, _see, stacked=depth)
    return Kept(blocks.each / depth, blocks.copies / depth)


def bank(cfg: Config, name: str) -> float:
    """Bytes of a sequence's bank of fused images, which the layers of the decoder read."""
    return _size(jax.tree.leaves(_bank(_model(_with_llm(cfg, 1, "none")), *_sequence(cfg, name, 1))))


def _depth(cfg: Config) -> int:
    """Blocks of the tower that the model has."""
    shapes = _shapes(_model(_with_llm(cfg, 1, "none")))
    return next(leaf.shape[0] for path, leaf in shapes.items() if path.startswith("vision/blocks/"))


# The half that is not looked at gets settings that do not change, so that each half is traced as seldom as possible.


def _with_llm(cfg: Config, tensor: int, remat: str) -> Config:
    m = cfg.llm
    local = {"heads": m.heads // tensor, "kv_heads": max(1, m.kv_heads // tensor), "mlp_dim": m.mlp_dim // tensor}
    others = {part: dataclasses.replace(getattr(cfg, part), remat="none") for part in ("vision", "fusion")}
    return dataclasses.replace(cfg, llm=dataclasses.replace(m, remat=remat, **local), **others)


def _with_vision(cfg: Config, tensor: int, remat: str) -> Config:
    vision = dataclasses.replace(cfg.vision, mlp_dim=cfg.vision.mlp_dim // tensor, remat=remat)
    return dataclasses.replace(cfg, vision=vision, llm=dataclasses.replace(cfg.llm, remat="none"))


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


def _sequence(cfg: Config, name: str, seq_len: int) -> tuple[tuple, Any]:
    """Leaves and structure of a batch of one sequence; a batch itself cannot be hashed."""
    leaves, structure = jax.tree.flatten(spec_of(cfg, 1, seq_len, slots_of(cfg, name), most_segments=1))
    return tuple(leaves), structure


@functools.lru_cache(maxsize=64)
def _shapes(model: SparseCut) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape of a parameter}."""
    parts = {part: dataclasses.replace(getattr(model, part), remat="none") for part in ("vision_config", "llm_config")}
    return flatten(nn.meta.unbox(boxed_shapes(model.clone(attention="xla", dtype=jnp.float32, **parts), 1)))


@functools.lru_cache(maxsize=64)
def _bank(model: SparseCut, leaves: tuple, structure: Any) -> jax.ShapeDtypeStruct | None:
    """[R, B, M, S, D], the sources of one sequence."""
    encode = lambda params, batch: model.apply({"params": params}, (), batch, method=_encode)
    return jax.eval_shape(encode, unflatten(_shapes(model)), jax.tree.unflatten(structure, leaves))[1]


def _kept(cfg: Config, name: str, seq_len: int, half: Callable, stacked: int = 0) -> Kept:
    """What a half of the model keeps.

    stacked: count only what its layers keep, so many of them. What is outside, as norms before and after them, XLA
    computes again.
    """
    sequence = _sequence(cfg, name, seq_len)
    sources = _bank(_model(_with_llm(cfg, 1, "none")), *sequence) if half is _decode else None
    drops = bool(cfg.lora.rank and cfg.lora.dropout)
    return _compared(_model(cfg), cfg.stages[name].trainable, half, drops, *sequence, sources, stacked)


@functools.lru_cache(maxsize=1024)
def _compared(model: SparseCut, *inputs: Any) -> Kept:
    """Compares two batches to tell what grows with their sequences from what does not."""
    *inputs, stacked = inputs
    rows = max(model.llm_config.layers, model.vision_config.layers) + 1  # so that no axis of rows is as long as a stack
    fewer, more = (
        _size([leaf for leaf in _traced(model, *inputs, count) if not stacked or leaf.shape[:1] == (stacked,)])
        for count in (rows, 2 * rows)
    )
    return Kept((more - fewer) / rows, 2 * fewer - more)


@functools.lru_cache(maxsize=256)
def _traced(
    model: SparseCut,
    trainable: tuple[str, ...],
    half: Callable,
    drops: bool,
    leaves: tuple,
    structure: Any,
    sources: jax.ShapeDtypeStruct | None,
    rows: int,
) -> list[jax.ShapeDtypeStruct]:
    """What the backward pass of half(model, inputs, batch) needs for `rows` sequences, other than what exists anyway."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    batch = jax.tree.unflatten(structure, [of(leaf.dtype, rows, *leaf.shape[1:]) for leaf in leaves])
    trained = lambda path: any(re.fullmatch(pattern, path) for pattern in trainable)
    moving = {path: leaf for path, leaf in _shapes(model).items() if trained(path)}
    frozen = {
        path: of(model.dtype if leaf.ndim > 1 else leaf.dtype, *leaf.shape)
        for path, leaf in _shapes(model).items()
        if path not in moving
    }
    sources = sources and of(sources.dtype, sources.shape[0], rows, *sources.shape[2:])
    x = of(model.dtype, *batch.tokens.shape, model.llm_config.width)
    inputs = (x, sources) if half is _decode else ()

    def backward(moving: dict, frozen: dict, inputs: tuple, batch: Batch) -> Any:
        rngs = {"dropout": jax.random.key(0)} if drops else {}
        params = lambda moving: {"params": unflatten({**frozen, **moving})}
        run = lambda moving, inputs: model.apply(params(moving), inputs, batch, rngs=rngs, method=half)
        return jax.vjp(run, moving, inputs)[1]

    residuals = [leaf for leaf in jax.tree.leaves(jax.eval_shape(backward, moving, frozen, inputs, batch)) if leaf.size]
    residuals = [leaf for leaf in residuals if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    signature = lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype))
    existing = collections.Counter(map(signature, jax.tree.leaves((moving, frozen, sources, batch))))
    new = []
    for leaf in residuals:
        if existing[signature(leaf)]:
            existing[signature(leaf)] -= 1
        else:
            new.append(leaf)
    return new


def _size(leaves: list[Any]) -> float:
    return float(sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves))
