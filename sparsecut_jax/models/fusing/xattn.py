"""`xattn`: gated cross-attention layers between those of the LLM look at a bank of tower levels; an image takes one position.

The outputs of K tower blocks for the low-res view stand side by side along channels, and one matrix [K * C, D] makes the bank
of N tokens. models/injecting/cross.py says what the layers do with it. A learned vector stands at the image's place in the
text; it says where the image is, not what it shows.

Source: Mllama (`MllamaForConditionalGeneration` in transformers), which concatenates levels and has a layer before every
fourth; Flamingo (arXiv 2204.14198). Tiles and their position embeddings are left out.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import Linear, normal, weight
from sparsecut_jax.models.shortcuts import evenly
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared", "vision.select_layer")
OF_WEIGHTS = ("fusion.xattn.layers", "fusion.xattn.levels")
EVERY, LEVELS = 4, 4  # defaults, as in Mllama: before layers 3, 7, 11, ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where the layers stand, and what they see."""

    layers: tuple[int, ...] = setting((), "LLM layers before which one stands, from 0; (): before every fourth.")
    levels: tuple[int, ...] = setting((), "Tower blocks that they see, from 0; (): four, evenly spaced.")


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for layers or blocks that do not exist, or are named twice."""
    depth, blocks = cfg.llm.layers, cfg.vision.layers
    layers = settings.layers or tuple(range(min(EVERY, depth) - 1, depth, EVERY))
    levels = settings.levels or tuple(evenly(min(LEVELS, blocks), blocks))
    for name, values, count in (("layers", layers, depth), ("levels", levels, blocks)):
        if len(set(values)) < len(values) or not all(0 <= value < count for value in values):
            whose = "layers of the LLM" if name == "layers" else "blocks of the vision tower"
            raise UserError(f"config.fusion.xattn.{name}={values}: expected different {whose}, from 0 to {count - 1}")
    return Wiring(
        levels=levels,
        positions=1,
        entering=tuple((0,) if layer in layers else () for layer in range(depth)),
        names=("levels",),
        injecting="cross",
    )


class Fuse(Fusing):
    """Levels [K, I, 1, N, C] -> tokens [I, 1, D], bank [1, I, N, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        side_by_side = jnp.concatenate(list(seen.levels[:, :, 0]), axis=-1)
        bank = Linear(self.width, ("embed", "mlp"), name="projector")(side_by_side)
        place = weight(self, "place", (self.width,), ("norm",), normal(self.width**-0.5), bank.dtype)
        return Fused(jnp.broadcast_to(place, (bank.shape[0], 1, self.width)), bank[None])
