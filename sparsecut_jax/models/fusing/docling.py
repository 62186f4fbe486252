"""`docling`: pixel shuffle and a fixed table of positions at the input, a merger for each level, added after early layers.

With x[N, C] the main feature, x_k[N, C] the output of the k-th tower block that is read, shuffle(x) blocks of s x s tokens
side by side along the channels, [N, C] -> [S, s^2 C], s = 4 on the coarse path and 2 on the fine one, LN with eps 1e-5 and
exact GELU, all of the low-res view:

    tokens = LN(gelu(LN(shuffle(LN(x)) Wp + table)) Wo)         Wp[s^2 C, D] and Wo[D, D] without biases
    source_k = gelu(LN(shuffle(x_k)) W1) W2                     W1[s^2 C, D] and W2[D, D] with biases, of its own

table[S, D] is not trained: half of the channels for the column, then half for the row, each as D / 4 sines and D / 4
cosines of position / 10000^(4 j / D). hidden[image positions] += source_k after LLM layer k = 0, 1, ..., without a gate.

One path is chosen for all pictures: the original's router, which takes the fine one for pictures with much text, is left
out, and so are its tiles. The original's main feature is the last block's output (vision.select_layer=-1) after the tower's
last norm, which towers here do not have. Weights begin as everywhere in this framework, not as normal(0.02).

Source: Granite Docling; Hugging Face `GraniteDoclingConnector` and `GraniteDoclingTextModel`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import LayerNorm, Linear
from sparsecut_jax.models.levels import gelu, merge_blocks, patches, side, stack, wiring_after_first_layers
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.rules import LINEAR, Rule, linear, norm
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")
OF_WEIGHTS = ("fusion.docling.path", "fusion.docling.levels")
SIZES = {"coarse": 4, "fine": 2}
RULES = {
    "vision_model.connector": [
        *(rule for ours, name in (("norm1", "ln_in"), ("norm2", "ln_mid"), ("norm3", "ln_out")) for rule in norm(f"fusion/connector/{ours}", name)),
        Rule("fusion/connector/out/kernel", "mlp_fc2.weight", LINEAR),
        *(Rule(f"fusion/connector/{path}/kernel", f"{path}.projection.weight", LINEAR) for path in SIZES),
        *(
            rule
            for path in SIZES
            for rule in (
                *norm(f"fusion/{path}_mergers/norm", f"{path}.deepstack_mergers.{{i}}.layer_norm"),
                *linear(f"fusion/{path}_mergers/fc1", f"{path}.deepstack_mergers.{{i}}.linear_1"),
                *linear(f"fusion/{path}_mergers/fc2", f"{path}.deepstack_mergers.{{i}}.linear_2"),
            )
        ),
    ]
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many tokens become one, and which levels are injected."""

    path: Literal["coarse", "fine"] = setting(
        "coarse", "Blocks of 4 x 4 tokens become one (coarse), or of 2 x 2 (fine)."
    )
    levels: tuple[int, ...] = setting(
        (),
        "Tower blocks whose outputs enter after LLM layers 0, 1, ...; (): 3, 7 and 10 of 12, at any depth as far up.",
    )


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError if the table of positions does not fit the LLM's width."""
    if cfg.llm.width % 4:
        raise UserError(
            f"config.fusion.name='docling' needs a multiple of 4 for its table of positions; config.llm.width={cfg.llm.width}"
        )


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for impossible levels, and for a grid of tokens that blocks do not fill."""
    size, depth = SIZES[settings.path], cfg.vision.layers
    if side(cfg) % size:
        raise UserError(
            f"config.fusion.docling.path={settings.path!r} joins blocks of {size} x {size} tokens, which do not fill the "
            f"{side(cfg)} x {side(cfg)} tokens of a view"
        )
    levels = settings.levels or tuple(block * depth // 12 - 1 for block in (4, 8, 11))
    return wiring_after_first_layers("config.fusion.docling.levels", levels, patches(cfg) // size**2, cfg)


def position_table(grid: int, width: int) -> jax.Array:
    """float32[grid * grid, width], fixed positions of tokens in row-major order; see above."""
    frequency = 10000.0 ** -(jnp.arange(width // 4) / (width // 4))
    angle = jnp.arange(grid)[:, None] * frequency
    line = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)  # [grid, width / 2]
    columns, rows = jnp.tile(line, (grid, 1)), jnp.repeat(line, grid, axis=0)
    return jnp.concatenate([columns, rows], axis=-1)


class Connector(nn.Module):
    """[I, N, C] -> [I, S, D]."""

    width: int
    route: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = lambda name: LayerNorm(1e-5, name=name)
        x = merge_blocks(norm("norm1")(x), SIZES[self.route])
        x = Linear(self.width, ("embed", "mlp"), use_bias=False, name=self.route)(x)
        x += position_table(math.isqrt(x.shape[-2]), self.width).astype(x.dtype)
        x = Linear(self.width, ("mlp", "embed"), use_bias=False, name="out")(gelu(norm("norm2")(x)))
        return norm("norm3")(x)


class Merger(nn.Module):
    """[I, N, C] -> [I, S, D]."""

    width: int
    route: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = LayerNorm(1e-5, name="norm")(merge_blocks(x, SIZES[self.route]))
        x = Linear(self.width, ("embed", "mlp"), name="fc1")(x)
        return Linear(self.width, ("mlp", "embed"), name="fc2")(gelu(x))


class Fuse(Fusing):
    """Levels [1 + K, I, 1, N, C], the main feature first -> tokens [I, S, D], bank [K, I, S, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels, path = seen.levels[:, :, 0], self.settings.path
        connector = rematted(Connector, self.config.remat, scanned=False)
        mergers = stack(Merger, len(levels) - 1, self.config.remat)
        return Fused(
            connector(self.width, path, name="connector")(levels[0]),
            mergers(self.width, path, name=f"{path}_mergers")(levels[1:]),
        )
