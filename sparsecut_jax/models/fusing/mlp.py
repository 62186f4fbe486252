"""`mlp`: the low-res view alone, through LLaVA-1.5's projector (arXiv 2310.03744)."""

from __future__ import annotations

import jax
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.levels import Projector, each_level, level_per_source, shortcut_wiring
from sparsecut_jax.models.rules import LLAVA_OFFICIAL, projector
from sparsecut_jax.settings import Config

IGNORES = ("fusion.grid",)
OFFICIAL = LLAVA_OFFICIAL
RULES = projector()


def wiring(settings: None, cfg: Config) -> Wiring:
    return shortcut_wiring(cfg, None)


class Mlp(nn.Module):
    """[I, 1, N, C] -> [I, N, D]."""

    width: int

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        return Projector(self.width, name="projector")(level[:, 0])


class Fuse(Fusing):
    """Every level by one set of weights, or one set each (`fusion.shared`)."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels = each_level(Mlp, seen.levels.shape[0], self.config)
        return level_per_source(levels(self.width, name="fuse")(seen.levels), seen)
