"""`dense`: several tower levels at the input, next to one another, through one projector. Nothing is injected.

Source: Dense Connector (arXiv 2405.13800). With hs[i] Hugging Face's hidden states of a tower of R blocks:
sti  more tokens: the main feature's, then those of hs[R/3 - 1] and hs[2R/3 - 1], averaged over runs of 8
sci  more channels: the main feature beside hs[R/3 - 1] and hs[2R/3 - 1]
dci  more channels: the main feature beside the means of the first and of the second half of the hidden states
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.levels import Projector, main_level, patches
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")
RUN = 8  # tokens that are averaged into one


@dataclasses.dataclass(frozen=True)
class Settings:
    """How levels are joined."""

    kind: Literal["sti", "sci", "dci"] = setting(
        "dci", "Levels become more tokens (sti), more channels (sci), or more channels after averaging (dci)."
    )


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for a tower that is too shallow, or whose tokens cannot be averaged in runs of 8."""
    depth, tokens = cfg.vision.layers, patches(cfg)
    if depth < 3:
        raise UserError(f"config.fusion.name='dense' needs 3 tower blocks or more; config.vision.layers={depth}")
    half = depth // 2
    pair = (depth // 3 - 2, 2 * depth // 3 - 2)  # blocks: hs[i] is the output of block i - 1
    others = tuple(range(-1, 2 * half - 1)) if settings.kind == "dci" else pair
    if settings.kind == "sti" and tokens % RUN:
        raise UserError(
            f"config.fusion.dense.kind='sti' averages runs of {RUN} tokens, but a view has {tokens}; change "
            "config.vision.image_size, or take 'sci' or 'dci'"
        )
    return Wiring(
        levels=(main_level(cfg), *others),
        positions=tokens + 2 * (tokens // RUN) if settings.kind == "sti" else tokens,
        entering=((),) * cfg.llm.layers,
    )


class Fuse(Fusing):
    """Levels [K, I, 1, N, C] -> tokens [I, S, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        main, *others = seen.levels[:, :, 0]
        if self.settings.kind == "sti":
            images, _, channels = main.shape
            pooled = [level.reshape(images, -1, RUN, channels).mean(2) for level in others]
            x = jnp.concatenate([main, *pooled], axis=1)
        else:
            if self.settings.kind == "dci":
                half = len(others) // 2
                others = [sum(others[:half]) / half, sum(others[half:]) / half]
            x = jnp.concatenate([main, *others], axis=-1)
        return Fused(rematted(Projector, self.config.remat, scanned=False)(self.width, name="projector")(x))
