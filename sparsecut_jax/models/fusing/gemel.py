"""`gemel`: an image is a prefix of a few tokens, all made from one pooled vector by one matrix. Nothing is injected.

With x[N, C] the main feature, tokens = (mean over N of x) W + b, W[C, 4 D], read as 4 rows of width D. The original pools
with CLIP's class token behind the last norm; towers without a class token have none, so this way takes the mean of the
patches. Source: GEMEL (arXiv 2306.12725), which trains this matrix alone.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import Linear
from sparsecut_jax.models.levels import main_level
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")
OF_WEIGHTS = ("fusion.gemel.tokens",)
MOST = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long the prefix is."""

    tokens: int = setting(4, "Positions that an image takes in the text.")


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError for a number of positions below 1 or above 1024."""
    if not 1 <= settings.tokens <= MOST:
        raise UserError(f"config.fusion.gemel.tokens={settings.tokens}: expected 1 to {MOST} positions")


def wiring(settings: Settings, cfg: Config) -> Wiring:
    return Wiring(levels=(main_level(cfg),), positions=settings.tokens, entering=((),) * cfg.llm.layers)


class Prefix(nn.Module):
    """[I, N, C] -> [I, tokens, D]."""

    tokens: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows = Linear(self.tokens * self.width, ("embed", "mlp"), name="fc")(x.mean(1))
        return rows.reshape(-1, self.tokens, self.width)


class Fuse(Fusing):
    """Level [1, I, 1, N, C] -> tokens [I, S, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        prefix = rematted(Prefix, self.config.remat, scanned=False)
        return Fused(prefix(self.settings.tokens, self.width, name="fuse")(seen.levels[0, :, 0]))
