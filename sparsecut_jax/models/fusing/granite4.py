"""`granite4`: windowed Q-Formers; the image's positions begin empty, and every LLM layer of a map adds a tower level to them.

Each source has a projector of its own. With h x h tokens x of C channels, a rate q/w and n = h / w windows on a side:

    f = LN(x)                                          eps 1e-6
    queries = query[q^2, C] + d                        d: the window of f, reduced to q x q tokens
    memory = f + image_positions[w^2, C]               the w x w tokens of the same window; both tables from N(0, 1/sqrt(C))
    u = LN(queries)                                    here and below eps 1e-12
    u = LN(u + self_attention(u)); u = LN(u + cross_attention(u, memory))
    u = LN(u + W2 gelu(W1 u))                          C // 64 heads, exact GELU, biases everywhere
    source[(n q)^2, D] = u W, in raster order

For a level d is the mean over areas. Four further sources, the spatial groups, all read one level at a rate of one half:
group g takes the token (g // 2, g % 2) of every 2 x 2 block. Tokens at the input are zeros; before LLM layer l
hidden[image positions] += source_l, so at layer 0 they are its source alone.

One tile, the low-res view: the original's further tiles and its newline vector between their rows are left out, and so is
its dropout (0.1 on memory, in the Q-Former and before W). The original's mlp_dim is 3072. Linear weights begin as everywhere
in this framework.

Source: Granite 4 Vision; Hugging Face `Granite4VisionWindowQFormerDownsampler` and `Granite4VisionTextModel`.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import LayerNorm, Linear, MultiHeadAttention, normal, weight
from sparsecut_jax.models.levels import gelu, heads_of, merge_blocks, side, stack
from sparsecut_jax.models.plans import rounded
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared", "vision.select_layer")
OF_WEIGHTS = tuple(
    f"fusion.granite4.{name}"
    for name in ("rate", "levels", "layers", "spatial", "spatial_level", "spatial_layers", "mlp_dim")
)
GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which tower levels enter which LLM layers, and how far their tokens are reduced."""

    rate: str = setting(
        "",
        'Side of the queries over the side of a window, "4/8" in the original; "": half of 8, 4 or 2, the first that fits.',
    )
    levels: tuple[int, ...] = setting(
        (),
        "Tower blocks that enter; (): 26, 20, 14 and 8 of 27, at any depth as far up, fewer if the LLM has below 8 layers.",
    )
    layers: tuple[int, ...] = setting(
        (), "LLM layer of each level; (): 0, 3, 6, ... of 40, at any depth as far up, 0, 1, 2, ... below 14 layers."
    )
    spatial: bool = setting(True, "Whether four groups of tokens of one more level enter, too.")
    spatial_level: int = setting(-1, "Tower block of the four groups; -1: the last one.")
    spatial_layers: tuple[int, ...] = setting(
        (), "LLM layers of the four groups; (): those that follow in the same steps."
    )
    mlp_dim: int = setting(0, "Width inside the MLP of a Q-Former; 0: three times the tower's.")


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError if the heads do not divide the tower's width, and for settings that contradict one another."""
    width = cfg.vision.width
    if width % heads_of(width):
        raise UserError(
            f"config.fusion.name='granite4' has width // 64 heads, which does not divide config.vision.width={width}"
        )
    if settings.mlp_dim < 0:
        raise UserError(f"config.fusion.granite4.mlp_dim={settings.mlp_dim}: expected 0 or more")
    for name in ("spatial_level", "spatial_layers"):
        value = getattr(settings, name)
        if value != getattr(Settings(), name) and not settings.spatial:
            raise UserError(f"config.fusion.granite4.{name}={value} has no effect with spatial=False; leave one out")


def sharded_sizes(settings: Settings, cfg: Config) -> dict[str, int]:
    return {"config.vision.width // 64": heads_of(cfg.vision.width)}


def window(settings: Settings, h: int) -> tuple[int, int]:
    """(q, w), the sides of the queries and of a window. Raises UserError if windows do not fill h x h tokens."""
    if not settings.rate:
        fits = next((w for w in (8, 4, 2) if h % w == 0), 0)
        if not fits:
            raise UserError(
                f"config.fusion.granite4.rate: no window of 8, 4 or 2 fills the {h} x {h} tokens of a view; set it"
            )
        return fits // 2, fits
    parts = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", settings.rate)
    if not parts or int(parts[1]) > int(parts[2]):
        raise UserError(
            f"config.fusion.granite4.rate={settings.rate!r}: expected two sides such as '4/8', the first no larger"
        )
    q, w = int(parts[1]), int(parts[2])
    if h % w:
        raise UserError(
            f"config.fusion.granite4.rate={settings.rate!r}: windows of {w} x {w} do not fill the {h} x {h} tokens of a view"
        )
    if settings.spatial and w != 2 * q:
        raise UserError(
            f"config.fusion.granite4.rate={settings.rate!r}: the spatial groups need a rate of one half; set spatial=False"
        )
    return q, w


def layer_map(settings: Settings, cfg: Config) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Levels, the layer of each, and the layers of the spatial groups. Raises UserError if they cannot be."""
    depth, layers, groups = cfg.vision.layers, cfg.llm.layers, GROUPS * settings.spatial
    levels = settings.levels
    if not levels:
        original = dict.fromkeys(rounded(state * depth, 27) - 1 for state in (27, 21, 15, 9))
        levels = tuple(level for level in original if level >= 0)[: max(1, layers - groups)]
    count = len(levels)
    step = lambda i: rounded(3 * i * layers, 40) if layers >= 14 else i
    of_levels = settings.layers or tuple(map(step, range(count)))
    of_groups = settings.spatial_layers or tuple(map(step, range(count, count + groups)))
    if not all(0 <= level < depth for level in levels):
        raise UserError(
            f"config.fusion.granite4.levels={levels}: expected blocks of the vision tower, from 0 to {depth - 1}"
        )
    if not -1 <= settings.spatial_level < depth:
        raise UserError(
            f"config.fusion.granite4.spatial_level={settings.spatial_level}: expected a block of the vision tower, from 0 "
            f"to {depth - 1}, or -1"
        )
    if len(of_levels) != count or len(of_groups) != groups:
        raise UserError(
            f"config.fusion.granite4 has {len(of_levels)} layers for {count} levels and {len(of_groups)} for {groups} spatial "
            "groups; name one for each"
        )
    for layer in (both := of_levels + of_groups):
        if not 0 <= layer < layers:
            raise UserError(
                f"config.fusion.granite4 puts {len(both)} sources into LLM layers {both}, but the LLM "
                f"has 0 to {layers - 1}; name fewer levels, other layers, or set spatial=False"
            )
        if both.count(layer) > 1:
            raise UserError(
                f"config.fusion.granite4 names LLM layer {layer} twice, in layers={of_levels} and spatial_layers={of_groups}; "
                "each layer adds one source"
            )
    return levels, of_levels, of_groups


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for a map or a rate that cannot be, and for a layer that is named twice."""
    q, w = window(settings, side(cfg))
    levels, of_levels, of_groups = layer_map(settings, cfg)
    layers = of_levels + of_groups
    return Wiring(
        levels=(*levels, *[settings.spatial_level % cfg.vision.layers] * settings.spatial),
        positions=(side(cfg) // w * q) ** 2,
        entering=tuple((layers.index(i),) if i in layers else () for i in range(cfg.llm.layers)),
        names=(*(f"vit{level}" for level in levels), *(f"spatial{group}" for group in range(len(of_groups)))),
    )


def area_means(q: int, w: int) -> np.ndarray:
    """float32[q*q, w*w]: the mean of the tokens of a window that each of its q x q areas covers, wholly or in part."""
    line = np.zeros((q, w), np.float32)
    for i in range(q):
        begin, end = i * w // q, -(-(i + 1) * w // q)
        line[i, begin:end] = 1 / (end - begin)
    return np.kron(line, line)


def group_picks(q: int) -> np.ndarray:
    """float32[4, q*q, 4*q*q]: the tokens (g // 2, g % 2) of the 2 x 2 blocks of a window of 2q x 2q tokens."""
    line = np.eye(2 * q, dtype=np.float32).reshape(q, 2, 2 * q)
    return np.stack([np.kron(line[:, g // 2], line[:, g % 2]) for g in range(GROUPS)])


class WindowQFormer(nn.Module):
    """One level [I, N, C] and how its windows are reduced, [q*q, w*w] -> [I, S, D]."""

    width: int
    sides: tuple[int, int]
    mlp_dim: int
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, reduction: jax.Array) -> jax.Array:
        (images, _, c), (q, w) = x.shape, self.sides
        norm = lambda name: LayerNorm(1e-12, name=name)
        table = lambda name, length: weight(self, name, (length, c), (None, "embed"), normal(c**-0.5), x.dtype)
        attend = lambda name: MultiHeadAttention(heads_of(c), self.attention, name=name)
        f = merge_blocks(LayerNorm(1e-6, name="norm")(x), w).reshape(-1, w * w, c)  # a window is a row
        u = table("query", q * q) + jnp.einsum("qw,Iwc->Iqc", reduction.astype(f.dtype), f)
        u = norm("norm1")(u)
        u = norm("norm2")(u + attend("self_attention")(u))
        u = norm("norm3")(u + attend("cross_attention")(u, f + table("image_positions", w * w)))
        inner = gelu(Linear(self.mlp_dim, ("embed", "mlp"), name="fc1")(u))
        u = norm("norm4")(u + Linear(c, ("mlp", "embed"), name="fc2")(inner))
        windows = math.isqrt(u.shape[0] // images)
        u = u.reshape(images, windows, windows, q, q, c).swapaxes(2, 3).reshape(images, -1, c)
        return Linear(self.width, ("embed", "mlp"), name="out")(u)


class Fuse(Fusing):
    """Levels [K, I, 1, N, C], and one more for the groups -> tokens [I, S, D] of zeros, bank [K + 4, I, S, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels, settings = seen.levels[:, :, 0], self.settings
        _, images, n, c = levels.shape
        count = len(levels) - settings.spatial
        q, w = window(settings, math.isqrt(n))

        def project(name: str, x: jax.Array, reductions: np.ndarray) -> jax.Array:
            """A projector of its own for each of x [R, I, N, C] -> [R, I, S, D]."""
            each = stack(WindowQFormer, len(x), self.config.remat)
            return each(self.width, (q, w), settings.mlp_dim or 3 * c, self.attention, name=name)(x, reductions)

        bank = project("levels", levels[:count], np.tile(area_means(q, w), (count, 1, 1)))
        if settings.spatial:
            repeated = jnp.broadcast_to(levels[count], (GROUPS, images, n, c))
            bank = jnp.concatenate([bank, project("spatial", repeated, group_picks(q))])
        return Fused(jnp.zeros(bank.shape[1:], bank.dtype), bank)
