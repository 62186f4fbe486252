"""Multi-grained fusion: joins the low- and hi-res tokens of one tower level into N tokens of the LLM's width.

A fusion is a Linen module `fuse(level[I, V, N, C]) -> [I, N, D]`, registered in FUSIONS; `reads_crops` says whether it
uses the hi-res crops. `Fusion` applies it to `levels[K, I, V, N, C]`: row 0 is the main feature, the others are the levels
of the shortcuts. One set of weights serves all rows (as in SparseCut), or each row has its own (`shared=False`). All rows
are processed in one batched call.

Source: SparseCut (arXiv 2602.00505), section on multi-grained fusion; `mlp` is LLaVA-1.5's projector
(arXiv 2310.03744). GELU is the exact one throughout.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, MultiHeadAttention
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.settings import FusionConfig

gelu = ACTIVATIONS["gelu"]


def views_of(config: FusionConfig) -> int:
    """Number of views per image that the fusion reads (V): the low-res one, plus the crops if it uses them."""
    return 1 + math.prod(config.grid) if FUSIONS[config.name].reads_crops else 1


def crops_to_cells(crops: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Aligns the tokens of the crops with the low-res token that covers the same place.

    A grid of r x s crops (each h x h tokens) forms a canvas of rh x sh tokens. Low-res token (y, x) covers the r x s
    canvas cells from (ry, sx) on: (2y, 2x), (2y, 2x+1), (2y+1, 2x), (2y+1, 2x+1) for 2 x 2.

    Args:
      crops: [..., r*s, N, C], N = h*h; crops and their tokens in row-major order.
      grid: (r, s).

    Returns:
      [..., N, r*s*C], the covered cells concatenated in row-major order.
    """
    *lead, _, n, c = crops.shape
    r, s = grid
    h = round(n**0.5)
    i = len(lead)
    canvas = crops.reshape(*lead, r, s, h, h, c).swapaxes(i + 1, i + 2).reshape(*lead, h, r, h, s, c)
    return canvas.swapaxes(i + 1, i + 2).reshape(*lead, n, r * s * c)


class Projector(nn.Module):
    """Linear, GELU, Linear, both of output width `width`: LLaVA's `mlp2x_gelu`. [..., C] -> [..., D]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Linear(self.width, ("embed", "mlp"), name="fc1")(x)
        return Linear(self.width, ("mlp", "embed"), name="fc2")(gelu(x))


class Channel(nn.Module):
    """`channel` (official name `cross_mlp`): concatenates along channels, VC -> D. [I, V, N, C] -> [I, N, D]."""

    width: int
    grid: tuple[int, int]
    attention: str = "xla"
    reads_crops = True

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        x = jnp.concatenate([level[:, 0], crops_to_cells(level[:, 1:], self.grid)], axis=-1)
        return Projector(self.width, name="projector")(x)


class CrossAttention(nn.Module):
    """`cross_attention`: low-res tokens attend to the tokens of all crops. [I, V, N, C] -> [I, N, D].

    C // 64 heads (at least one); post-norm, x = LN1(q + attention), x = LN2(x + FFN(x)); FFN is
    C -> 4C -> C with GELU; LayerNorm eps 1e-5.
    """

    width: int
    grid: tuple[int, int]
    attention: str = "xla"
    reads_crops = True

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        count, _, _, c = level.shape
        low, crops = level[:, 0], level[:, 1:].reshape(count, -1, c)
        x = MultiHeadAttention(max(1, c // 64), self.attention, name="attention")(low, crops)
        x = LayerNorm(1e-5, name="norm1")(low + x)
        y = gelu(Linear(4 * c, ("embed", "mlp"), name="ffn1")(x))
        x = LayerNorm(1e-5, name="norm2")(x + Linear(c, ("mlp", "embed"), name="ffn2")(y))
        return Projector(self.width, name="projector")(x)


class Mlp(nn.Module):
    """`mlp`: only the low-res view, as in LLaVA-1.5. [I, 1, N, C] -> [I, N, D]."""

    width: int
    grid: tuple[int, int]
    attention: str = "xla"
    reads_crops = False

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        return Projector(self.width, name="projector")(level[:, 0])


FUSIONS = {"channel": Channel, "cross_attention": CrossAttention, "mlp": Mlp}


class Fusion(nn.Module):
    """Applies one of FUSIONS to every level: `levels[K, I, V, N, C] -> fused[K, I, N, D], aux_loss float32[]`.

    With `shared=False` parameters keep their names and get a leading axis, so that one weight table reads both forms.
    `text` is for fusions that use the question; none of these does. Raises ValueError for a wrong number of views.
    """

    config: FusionConfig
    width: int
    attention: str = "xla"

    @nn.compact
    def __call__(self, levels: jax.Array, text: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        module = rematted(FUSIONS[self.config.name], self.config.remat, scanned=False)
        count, _, views, _, _ = levels.shape
        if views != views_of(self.config):
            raise ValueError(f"fusion {self.config.name!r} reads {views_of(self.config)} views, got {views}")
        # vmap, not a reshape to [K * I, ...]: merging the replicated axis of levels with the sharded axis of images
        # would all-gather the images.
        shared = self.config.shared
        each = nn.vmap(
            module,
            in_axes=0,
            axis_size=count,
            variable_axes={"params": None if shared else 0},
            split_rngs={"params": not shared},
            metadata_params={} if shared else {nn.PARTITION_NAME: "layers"},
        )
        fused = each(self.width, self.config.grid, self.attention, name="fuse")(levels)
        return fused, jnp.zeros((), jnp.float32)
