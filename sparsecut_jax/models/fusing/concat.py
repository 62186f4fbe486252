"""`concat`: the tokens of every view stand in the text, each through LLaVA's projector. Nothing is fused, nothing is injected.

A control for ways that fuse crops: it sees the same pixels, at the cost of positions.

    layout   positions of V = 1 + r s views of h x h tokens
    views    V h h: one view after the other, the low-res view first, then the crops in row-major order
    tiles    h h + r h (s h + 1): the low-res view, then the crops as one picture of r h rows of s h tokens, each row followed
             by a learned vector

`tiles` is LLaVA-NeXT's order (`pack_image_features` in transformers' `LlavaNextModel`) for a square picture, which has no padding
to cut off, and a fixed grid.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import normal, weight
from sparsecut_jax.models.levels import Projector, main_level, patches, side
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.rules import Rule, projector
from sparsecut_jax.settings import Config, setting

IGNORES = ("shortcuts.", "fusion.shared")
RULES = projector(Rule("fusion/fuse/newline", "image_newline"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the tokens of the crops are ordered."""

    layout: Literal["views", "tiles"] = setting(
        "views",
        "One view after the other, or the crops row by row as one picture, each row followed by a learned vector.",
    )


def wiring(settings: Settings, cfg: Config) -> Wiring:
    (rows, columns), ends = cfg.fusion.grid, 0
    if settings.layout == "tiles":
        ends = rows * side(cfg)
    return Wiring(
        levels=(main_level(cfg),),
        positions=(1 + rows * columns) * patches(cfg) + ends,
        entering=((),) * cfg.llm.layers,
        grid=cfg.fusion.grid,
    )


class Concat(nn.Module):
    """[I, V, N, C] -> [I, S, D]. grid: rows and columns of the crops."""

    settings: Settings
    grid: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        tokens = Projector(self.width, name="projector")(level)
        images, _, n, width = tokens.shape
        if self.settings.layout == "views":
            return tokens.reshape(images, -1, width)
        (rows, columns), h = self.grid, round(n**0.5)
        picture = tokens[:, 1:].reshape(images, rows, columns, h, h, width).swapaxes(2, 3)
        picture = picture.reshape(images, rows * h, columns * h, width)
        newline = weight(self, "newline", (width,), ("norm",), normal(width**-0.5), tokens.dtype)
        ends = jnp.broadcast_to(newline, (images, rows * h, 1, width))
        picture = jnp.concatenate([picture, ends], axis=2).reshape(images, -1, width)
        return jnp.concatenate([tokens[:, 0], picture], axis=1)


class Fuse(Fusing):
    """Level [1, I, V, N, C] -> tokens [I, S, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        concat = rematted(Concat, self.config.remat, scanned=False)
        return Fused(concat(self.settings, self.wiring.grid, self.width, name="fuse")(seen.levels[0]))
