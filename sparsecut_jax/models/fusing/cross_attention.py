"""`cross_attention`: low-res tokens attend to the tokens of all crops.

Source: SparseCut (arXiv 2602.00505), section on multi-grained fusion.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import LayerNorm, Linear, MultiHeadAttention
from sparsecut_jax.models.levels import Projector, each_level, gelu, heads_of, level_per_source, shortcut_wiring
from sparsecut_jax.models.rules import linear, norm, packed_attention, projector
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

OFFICIAL = "cross_attention"
RULES = projector(
    *packed_attention("fusion/fuse/attention", "attn"),
    *norm("fusion/fuse/norm1", "norm1"),
    *norm("fusion/fuse/norm2", "norm2"),
    *linear("fusion/fuse/ffn1", "ffn.0"),
    *linear("fusion/fuse/ffn2", "ffn.2"),
)


def check(settings: None, cfg: Config) -> None:
    """Raises UserError if the heads do not divide the tower's width."""
    width = cfg.vision.width
    if width % heads_of(width):
        raise UserError(
            f"config.fusion.name='cross_attention' has width // 64 heads, which does not divide config.vision.width={width}"
        )


def sharded_sizes(settings: None, cfg: Config) -> dict[str, int]:
    return {"config.vision.width // 64": heads_of(cfg.vision.width)}


def wiring(settings: None, cfg: Config) -> Wiring:
    return shortcut_wiring(cfg, cfg.fusion.grid)


class CrossAttention(nn.Module):
    """[I, V, N, C] -> [I, N, D].

    C // 64 heads (at least one); post-norm, x = LN1(q + attention), x = LN2(x + FFN(x)); FFN is
    C -> 4C -> C with GELU; LayerNorm eps 1e-5.
    """

    width: int
    attention: str

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        count, _, _, c = level.shape
        low, crops = level[:, 0], level[:, 1:].reshape(count, -1, c)
        x = MultiHeadAttention(heads_of(c), self.attention, name="attention")(low, crops)
        x = LayerNorm(1e-5, name="norm1")(low + x)
        y = gelu(Linear(4 * c, ("embed", "mlp"), name="ffn1")(x))
        x = LayerNorm(1e-5, name="norm2")(x + Linear(c, ("mlp", "embed"), name="ffn2")(y))
        return Projector(self.width, name="projector")(x)


class Fuse(Fusing):
    """Every level by one set of weights, or one set each (`fusion.shared`)."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels = each_level(CrossAttention, seen.levels.shape[0], self.config)
        return level_per_source(levels(self.width, self.attention, name="fuse")(seen.levels), seen)
