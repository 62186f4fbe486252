"""`concat`: the tokens of every view stand in the text, one view after the other. Nothing is fused, nothing is injected.

A control for ways that fuse crops: it sees the same pixels through LLaVA's projector, at the cost of positions. Each of V views
takes N of them, the low-res view first, then the crops in row-major order: S = V N. LLaVA-NeXT's tiles are this with their
tokens in the order of the whole picture, with separators, and without the padded parts.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.levels import Projector, main_level, patches
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.rules import projector
from sparsecut_jax.settings import Config

IGNORES = ("shortcuts.", "fusion.shared")
RULES = projector()


def wiring(settings: None, cfg: Config) -> Wiring:
    rows, columns = cfg.fusion.grid
    return Wiring(
        levels=(main_level(cfg),),
        positions=(1 + rows * columns) * patches(cfg),
        entering=((),) * cfg.llm.layers,
        grid=cfg.fusion.grid,
    )


class Concat(nn.Module):
    """[I, V, N, C] -> [I, V N, D]."""

    width: int

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        tokens = Projector(self.width, name="projector")(level)
        return tokens.reshape(tokens.shape[0], -1, self.width)


class Fuse(Fusing):
    """Level [1, I, V, N, C] -> tokens [I, V N, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        return Fused(rematted(Concat, self.config.remat, scanned=False)(self.width, name="fuse")(seen.levels[0]))
