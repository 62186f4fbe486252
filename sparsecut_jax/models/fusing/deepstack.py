"""`deepstack`: the tokens of the hi-res crops, dealt into groups of N, enter one layer after the other.

All of them come from the tower level of the main feature, through one projector (or one for the low-res view and one for
the crops, with `fusion.shared=False`). Group i * s + j of an r x s grid holds the canvas tokens (y * r + i, x * s + j), so each group
is a sparse view of the whole picture. Source: DeepStack (arXiv 2406.04334).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.levels import Projector, crops_to_cells, main_level, patches
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.",)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which hi-res tokens form a group, and which layers the groups enter."""

    sampling: Literal["2d", "1d", "grid"] = setting(
        "2d",
        "A group takes every second row and column (2d), every fourth token (1d), or one crop (grid), for a 2 x 2 grid.",
    )
    start: int = setting(1, "LLM layer that the first group enters, from 0.")
    interval: int = setting(1, "Layers from one group to the next.")


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError if a group would enter a layer that does not exist."""
    count = math.prod(cfg.fusion.grid)
    if settings.start < 0 or settings.interval < 1:
        raise UserError(
            f"config.fusion.deepstack.start={settings.start} and .interval={settings.interval}: expected 0 or more and 1 or more"
        )
    layers = [settings.start + group * settings.interval for group in range(count)]
    if layers[-1] >= cfg.llm.layers:
        raise UserError(
            f"config.fusion.name='deepstack' puts {count} groups into layers {layers[0]} to {layers[-1]}, but the LLM has "
            f"layers 0 to {cfg.llm.layers - 1}; lower config.fusion.deepstack.start or .interval, or take a smaller "
            "config.fusion.grid"
        )
    return Wiring(
        levels=(main_level(cfg),),
        positions=patches(cfg),
        entering=tuple((layers.index(layer),) if layer in layers else () for layer in range(cfg.llm.layers)),
        names=tuple(f"group{group}" for group in range(count)),
        grid=cfg.fusion.grid,
    )


def groups_of(crops: jax.Array, grid: tuple[int, ...], sampling: str) -> jax.Array:
    """[I, r*s, N, C], crops in row-major order -> [r*s, I, N, C], their tokens in groups."""
    if sampling == "grid":
        return crops.swapaxes(0, 1)
    if sampling == "2d":
        return jnp.moveaxis(crops_to_cells(crops, grid), 2, 0)
    (rows, columns), (images, count, n, c) = grid, crops.shape
    h = math.isqrt(n)
    canvas = crops.reshape(images, rows, columns, h, h, c).swapaxes(2, 3).reshape(images, n, count, c)
    return jnp.moveaxis(canvas, 2, 0)


class Fuse(Fusing):
    """The low-res view stands at the image's positions, the groups are the sources."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        level = seen.levels[0]
        projector = rematted(Projector, self.config.remat, scanned=False)
        low = projector(self.width, name="projector")
        high = low if self.config.shared else projector(self.width, name="crop_projector")
        groups = groups_of(level[:, 1:], self.wiring.grid, self.settings.sampling)
        return Fused(low(level[:, 0]), high(groups))
