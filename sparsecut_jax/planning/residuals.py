"""What a layer keeps between forward and backward pass, read off JAX's own differentiation by shapes alone.

Remat policy, attention backend and frozen weights count as they do in the real step. Nothing is compiled.
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

from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.fusion import Fusion, views_of
from sparsecut_jax.models.llm import Context, Layer
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.shortcuts import Plan
from sparsecut_jax.models.sparsecut import build_model
from sparsecut_jax.models.vit import Block
from sparsecut_jax.settings import Config, FusionConfig, LLMConfig, LoraConfig, VisionConfig

# cuDNN's function queries the GPU, so splash stands in for it: it keeps arrays of the same shapes.
TRACED = {"cudnn": "splash"}


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps: `each` per sequence, view or image, and `copies` of weights in the compute dtype."""

    each: float
    copies: float


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that every kind of layer depends on."""

    dtype: str
    attention: str
    trainable: tuple[str, ...]
    remat: str


def llm_layer(cfg: Config, name: str, seq_len: int, tensor: int = 1, remat: str = "") -> Kept:
    """What a decoder layer keeps per sequence in stage `name`, its heads and hidden units sharded `tensor` ways.

    cfg: with no "auto" settings left. remat: a policy other than the config's.
    """
    m, policy = cfg.llm, remat or cfg.llm.remat
    if policy == "offload":  # to the host
        return Kept(0.0, 0.0)
    local = dataclasses.replace(
        m, heads=m.heads // tensor, kv_heads=max(1, m.kv_heads // tensor), mlp_dim=m.mlp_dim // tensor, remat=policy
    )
    return _llm_layer(_setting(cfg, name, policy), local, cfg.lora, build_model(cfg).plan, cfg.tokens_per_image, seq_len)  # fmt: skip


def vision_block(cfg: Config, name: str, tensor: int = 1, remat: str = "") -> Kept:
    """What a block of the tower keeps per view."""
    v = cfg.vision
    return _vision_block(_setting(cfg, name, remat or v.remat), dataclasses.replace(v, mlp_dim=v.mlp_dim // tensor))


def fusion(cfg: Config, name: str) -> Kept:
    """What the fusion of all levels keeps per image."""
    levels = 1 + len(build_model(cfg).plan.levels)
    setting = dataclasses.replace(
        _setting(cfg, name, cfg.fusion.remat), attention="tiled"
    )  # other backends keep as much
    return _fusion(setting, cfg.fusion, levels, cfg.tokens_per_image, cfg.vision.width, cfg.llm.width)


def _setting(cfg: Config, name: str, remat: str) -> Setting:
    return Setting(cfg.dtype, TRACED.get(cfg.attention, cfg.attention), cfg.stages[name].trainable, remat)


def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.lru_cache(maxsize=256)
def _llm_layer(setting: Setting, m: LLMConfig, lora: LoraConfig, plan: Plan, tokens: int, seq_len: int) -> Kept:
    layer = rematted(Layer, setting.remat)(m, lora, plan.position, (), setting.attention)
    dtype, sources = jnp.dtype(setting.dtype), len(plan.levels)

    def leaves(rows: int) -> list[Any]:
        ints = of(jnp.int32, rows, seq_len)
        context = Context(
            table=(of(jnp.float32, rows, seq_len, 1, m.head_dim // 2),) * 2,
            sight=Packed(ints, None, ints, 1),
            bank=of(dtype, sources, rows, 1, tokens, m.width) if sources else None,
            image_start=of(jnp.int32, rows, 1),
        )

        def run(params: Any, x: jax.Array, context: Context, index: jax.Array, route: jax.Array):
            rngs = {"dropout": jax.random.key(0)} if lora.rank and lora.dropout else {}
            return layer.apply({"params": params}, (x, None), index, route, context, rngs=rngs)[0][0]

        def init(x: jax.Array, context: Context, index: jax.Array, route: jax.Array):
            return layer.init(jax.random.key(0), (x, None), index, route, context)

        x, rest = of(dtype, rows, seq_len, m.width), (of(jnp.int32), of(jnp.int32, plan.route.shape[1]))
        return _leaves(setting, "llm/layers/", init, run, x, context, *rest)

    return _kept(leaves)


@functools.lru_cache(maxsize=256)
def _vision_block(setting: Setting, v: VisionConfig) -> Kept:
    block = rematted(Block, setting.remat)(v, setting.attention)
    dtype, positions = jnp.dtype(setting.dtype), (v.image_size // v.patch_size) ** 2 + v.class_token

    def leaves(views: int) -> list[Any]:
        def run(params: Any, x: jax.Array, row: jax.Array):
            return block.apply({"params": params}, (x, x[None]), row)[0][0]

        init = lambda x, row: block.init(jax.random.key(0), (x, x[None]), row)
        return _leaves(setting, "vision/blocks/", init, run, of(dtype, views, positions, v.width), of(jnp.int32))

    return _kept(leaves)


@functools.lru_cache(maxsize=256)
def _fusion(setting: Setting, config: FusionConfig, levels: int, tokens: int, channels: int, width: int) -> Kept:
    module = Fusion(config, width, setting.attention)

    def leaves(images: int) -> list[Any]:
        x = of(setting.dtype, levels, images, views_of(config), tokens, channels)
        run = lambda params, x: module.apply({"params": params}, x)[0]
        return _leaves(setting, "fusion/", lambda x: module.init(jax.random.key(0), x), run, x)

    return _kept(leaves)


def _leaves(setting: Setting, prefix: str, init: Callable, run: Callable, x: Any, *rest: Any) -> list[Any]:
    """What the backward pass of run(params, x, *rest) needs, other than parameters and `rest`, which exist anyway."""
    flat = flatten(nn.meta.unbox(jax.eval_shape(init, x, *rest)["params"]))
    trained = lambda path: any(re.fullmatch(pattern, prefix + path) for pattern in setting.trainable)
    moving = {path: leaf for path, leaf in flat.items() if trained(path)}
    frozen = {
        path: of(setting.dtype if leaf.ndim > 1 else leaf.dtype, *leaf.shape)
        for path, leaf in flat.items()
        if path not in moving
    }

    def backward(moving: dict, frozen: dict, x: Any, *rest: Any):
        return jax.vjp(lambda moving, x: run(unflatten({**frozen, **moving}), x, *rest), moving, x)[1]

    residuals = [leaf for leaf in jax.tree.leaves(jax.eval_shape(backward, moving, frozen, x, *rest)) if leaf.size]
    residuals = [leaf for leaf in residuals if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    signature = lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype))
    existing = collections.Counter(signature(leaf) for leaf in jax.tree.leaves((moving, frozen, rest)))
    new = []
    for leaf in residuals:
        if existing[signature(leaf)]:
            existing[signature(leaf)] -= 1
        else:
            new.append(leaf)
    return new


def _kept(leaves: Callable[[int], list[Any]]) -> Kept:
    """Compares the leaves for batches of one and two to tell what grows with the batch from what does not."""
    size = lambda count: sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves(count))
    one, two = size(1), size(2)
    return Kept(float(two - one), float(2 * one - two))
