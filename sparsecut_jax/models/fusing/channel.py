"""`channel` (official name `cross_mlp`): concatenates low- and hi-res tokens along channels.

Source: SparseCut (arXiv 2602.00505), section on multi-grained fusion.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.levels import Projector, crops_to_cells, each_level, level_per_source, shortcut_wiring
from sparsecut_jax.models.rules import projector
from sparsecut_jax.settings import Config

OFFICIAL = "cross_mlp"
OF_WEIGHTS = ("fusion.grid",)
RULES = projector()


def wiring(settings: None, cfg: Config) -> Wiring:
    return shortcut_wiring(cfg, cfg.fusion.grid)


class Channel(nn.Module):
    """VC -> D. [I, V, N, C] -> [I, N, D]."""

    width: int
    grid: tuple[int, ...]

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        cells = crops_to_cells(level[:, 1:], self.grid)
        x = jnp.concatenate([level[:, 0], cells.reshape(*cells.shape[:-2], -1)], axis=-1)
        return Projector(self.width, name="projector")(x)


class Fuse(Fusing):
    """Every level by one set of weights, or one set each (`fusion.shared`)."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels = each_level(Channel, seen.levels.shape[0], self.config)
        return level_per_source(levels(self.width, self.wiring.grid, name="fuse")(seen.levels), seen)
