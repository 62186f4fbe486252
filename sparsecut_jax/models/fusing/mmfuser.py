"""`mmfuser`: the main feature looks up details in shallower tower levels, by deformable attention, before LLaVA's projector.

With q[N, C] the main feature, F the tokens of 4 shallower levels, and LN layer norms of eps 1e-6,

    a = attend(LN q, LN F)
    b = attend'(LN' a, LN' a)
    y = q + s1 * (a + s2 * b)       s1[C] = s2[C] = 0 before the first step, where y = q

`attend` (deformable attention, arXiv 2010.04159) reads P = 4 points of each level per head instead of all tokens. The query at
column x and row y of its grid reads value = F Wv at (x, y) + offset, between four tokens and with zeros beyond the edge;
offset = q Wo + bo for every head, level and point, weights = softmax over levels and points of q Wa + ba, and the heads' sums
go through W[C, C]. At first Wo = Wa = 0 and bo has the points 1 to 4 tokens away, in another direction for every head.

The published levels are outputs of blocks 2, 7, 12 and 17 of 24. Towers of another depth R have block l R / 24, rounded down;
below 5 blocks one of them is read twice. s2 gets no gradient while s1 = 0, so b's weights begin to train with the third step. To begin with LLaVA's
trained projector, name its file in `init.fusion` and set `init.fresh=("fusion/fuse/(?!projector/).*",)`.
Source: MMFuser (arXiv 2410.11829).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import LayerNorm, weight, zeros
from sparsecut_jax.models.levels import Projector, main_level, patches
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.rules import projector
from sparsecut_jax.runtime.sharding import constrain
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")
OF_WEIGHTS = ("fusion.mmfuser.levels", "fusion.mmfuser.heads")
RULES = projector()
PUBLISHED = (2, 7, 12, 17)  # of 24 blocks
POINTS = 4
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the main feature looks at."""

    levels: tuple[int, ...] = setting(
        (), "Tower blocks that are looked up, from 0; (): those published, scaled to the depth."
    )
    heads: int = setting(16, "Heads of the attention; they divide vision.width.")


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError for heads that do not divide the tower's width."""
    width = cfg.vision.width
    if settings.heads < 1 or width % settings.heads:
        raise UserError(
            f"config.fusion.mmfuser.heads={settings.heads}: expected a number that divides config.vision.width={width}"
        )


def sharded_sizes(settings: Settings, cfg: Config) -> dict[str, int]:
    return {"config.fusion.mmfuser.heads": settings.heads}


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for levels that do not exist."""
    depth = cfg.vision.layers
    levels = settings.levels or tuple(level * depth // 24 for level in PUBLISHED)
    if not all(0 <= level < depth for level in levels):
        raise UserError(
            f"config.fusion.mmfuser.levels={levels}: expected blocks of the vision tower, from 0 to {depth - 1}"
        )
    return Wiring(levels=(main_level(cfg), *levels), positions=patches(cfg), entering=((),) * cfg.llm.layers)


def directions(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype, levels: int) -> jax.Array:
    """[heads, levels * POINTS * 2], (x, y) of every level's points; an initialiser that draws nothing.

    Head h of H points at angle 2 pi h / H, its points 1, 2, ... tokens away as the larger of x and y.
    """
    angle = 2 * np.pi * np.arange(shape[0]) / shape[0]
    unit = np.stack([np.cos(angle), np.sin(angle)], -1)
    unit /= np.abs(unit).max(-1, keepdims=True)
    steps = np.arange(1, POINTS + 1)
    points = np.broadcast_to(unit[:, None, None] * steps[:, None], (shape[0], levels, POINTS, 2))
    return jnp.asarray(points.reshape(shape), dtype)


def between(value: jax.Array, place: jax.Array, shares: jax.Array) -> jax.Array:
    """Weighted sums of an image's values between its tokens.

    Args:
      value: [I, H, K, N, E], values of K levels of h x h = N tokens.
      place: float32[I, H, K, Q, P, 2], (x, y) of P points in tokens, (0, 0) at the centre of the first one.
      shares: float32[I, H, K, Q, P], weights of the points.

    Returns:
      [I, H, Q, E] in the dtype of `value`: sums over levels and points of the values, interpolated linearly along x and y, and 0
      beyond the edge.
    """
    images, heads, levels, n, channels = value.shape
    queries, points = place.shape[3:5]
    side = math.isqrt(n)
    low = jnp.floor(place)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            corner = low + jnp.array([dx, dy], low.dtype)
            near = jnp.prod(1 - jnp.abs(place - corner), axis=-1)
            inside = jnp.all((corner >= 0) & (corner < side), axis=-1)
            x, y = jnp.moveaxis(jnp.clip(corner, 0, side - 1).astype(jnp.int32), -1, 0)
            index = (y * side + x).reshape(images, heads, levels, queries * points, 1)
            read = jnp.take_along_axis(value, index, axis=3)
            read = read.reshape(images, heads, levels, queries, points, channels)
            share = jnp.where(inside, shares * near, 0).astype(value.dtype)
            total += jnp.einsum("IHKQPE,IHKQP->IHQE", read, share)
    return total


class Deformable(nn.Module):
    """Queries [I, N, C] and levels [K, I, N, C] -> [I, N, C]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, levels: jax.Array) -> jax.Array:
        images, n, width = x.shape
        count, each, side = levels.shape[0], width // self.heads, math.isqrt(n)
        xavier = nn.initializers.normal(width**-0.5)  # of a square matrix

        def project(name: str, equation: str, inputs: jax.Array, size: int, kernel, bias) -> jax.Array:
            shape, axes = (width, self.heads, size), ("embed", "heads", "head_dim")
            y = jnp.einsum(equation, inputs, weight(self, f"{name}_kernel", shape, axes, kernel, x.dtype))
            return y + weight(self, f"{name}_bias", shape[1:], axes[1:], bias, x.dtype)

        value = project("value", "KINC,CHE->KINHE", levels, each, xavier, zeros)
        value = jnp.moveaxis(value, (0, 3), (2, 1))  # [I, H, K, N, E]
        points = lambda name, numbers, bias: project(
            name, "INC,CHE->INHE", x, count * POINTS * numbers, zeros, bias
        ).astype(jnp.float32)
        first = lambda *shape: directions(*shape, count)
        offset = points("offset", 2, first).reshape(images, n, self.heads, count, POINTS, 2)
        shares = jax.nn.softmax(points("share", 1, zeros), axis=-1).reshape(images, n, self.heads, count, POINTS)
        rows, columns = jnp.divmod(jnp.arange(n), side)
        own = jnp.stack([columns, rows], -1).astype(jnp.float32)[:, None, None, None]
        by_level = lambda x: jnp.moveaxis(x, 1, 3)  # [I, N, H, K, ...] -> [I, H, K, N, ...]
        out = between(value, by_level(own + offset), by_level(shares))
        out = constrain(jnp.swapaxes(out, 1, 2), "batch", "length", "act_heads", None)
        kernel = weight(self, "out_kernel", (self.heads, each, width), ("heads", "head_dim", "embed"), xavier, x.dtype)
        return jnp.einsum("INHE,HEC->INC", out, kernel) + weight(self, "out_bias", (width,), ("norm",), zeros, x.dtype)


class MMFuser(nn.Module):
    """Levels [1 + K, I, N, C], the main feature first -> [I, N, D]."""

    heads: int
    width: int

    @nn.compact
    def __call__(self, levels: jax.Array) -> jax.Array:
        x, others = levels[0], levels[1:]
        scale = lambda name: weight(self, name, x.shape[-1:], ("norm",), zeros, x.dtype)
        seen = Deformable(self.heads, name="look")(
            LayerNorm(EPS, name="query_norm")(x), LayerNorm(EPS, name="level_norm")(others)
        )
        normed = LayerNorm(EPS, name="norm")(seen)
        again = Deformable(self.heads, name="look_again")(normed, normed[None])
        x += scale("scale1") * (seen + scale("scale2") * again)
        return Projector(self.width, name="projector")(x)


class Fuse(Fusing):
    """Levels [1 + K, I, 1, N, C] -> tokens [I, N, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        fuser = rematted(MMFuser, self.config.remat, scanned=False)
        return Fused(fuser(self.settings.heads, self.width, name="fuse")(seen.levels[:, :, 0]))
