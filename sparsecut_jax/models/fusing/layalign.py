"""`layalign`: every chosen LLM layer attends to its own mixtures of all tower levels, besides a prefix of image tokens.

With E[K, N, C] the outputs of all K tower blocks for the low-res view, J chosen LLM layers and relu between matrices,

    P = relu(mix E)                 mix[K, 2J] over the axis of levels: two mixtures for a layer, for its keys and its values
    sources = P W                   W[C, D], shared; with structure="mlp" another relu and matrix [D, D] follow
    prefix = [relu(E_K-1 W1) W2; end]       W1[C, 2C], W2[2C, D], and a learned end vector: N + 1 positions

The layers attend to their sources as models/injecting/llm_kv.py says. Without the prefix an image takes no position; its
place in the text still says which tokens stand behind it.

Each mixture begins as the mean of all levels. All begin alike, but each feeds the matrices of another layer, which give it a
gradient of its own. The sources take 2 J N D numbers per image.

Source: LayAlign (arXiv 2502.11405), which aligns the layers of a text encoder; here tower levels take their place.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import Linear, normal, weight
from sparsecut_jax.models.levels import patches
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared", "vision.select_layer")
OF_WEIGHTS = ("fusion.layalign.layers", "fusion.layalign.structure", "fusion.layalign.prefix")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which layers attend to the image, and what else it leaves in the text."""

    layers: tuple[int, ...] = setting((), "LLM layers that attend to the image, from 0; (): all.")
    structure: Literal["linear", "mlp"] = setting(
        "linear", "From the mixtures to the LLM's width by one matrix (linear), or by two with a relu between (mlp)."
    )
    prefix: bool = setting(True, "Whether the last tower level also stands at the image's place in the text.")


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for layers that do not exist, or one that is named twice."""
    depth = cfg.llm.layers
    layers = settings.layers or tuple(range(depth))
    if len(set(layers)) < len(layers) or not all(0 <= layer < depth for layer in layers):
        raise UserError(
            f"config.fusion.layalign.layers={layers}: expected different layers of the LLM, from 0 to {depth - 1}"
        )
    site = layers.index
    return Wiring(
        levels=tuple(range(cfg.vision.layers)),
        positions=patches(cfg) + 1 if settings.prefix else 0,
        entering=tuple((2 * site(i), 2 * site(i) + 1) if i in layers else () for i in range(depth)),
        names=tuple(f"{what}{layer}" for layer in layers for what in ("keys", "values")),
        injecting="llm_kv",
    )


class Align(nn.Module):
    """Levels [K, I, N, C] -> sources [count, I, N, D]."""

    count: int
    width: int
    structure: str

    @nn.compact
    def __call__(self, levels: jax.Array) -> jax.Array:
        shape = (levels.shape[0], self.count)
        mix = weight(self, "mix", shape, ("levels", None), nn.initializers.constant(1 / shape[0]), levels.dtype)
        x = nn.relu(jnp.einsum("KINC,KR->RINC", levels, mix))
        if self.structure == "linear":
            # Not split over the tensor axis: every layer would gather its sources over it.
            return Linear(self.width, ("embed", None), name="fc1")(x)
        x = nn.relu(Linear(self.width, ("embed", "mlp"), name="fc1")(x))
        return Linear(self.width, ("mlp", "embed"), name="fc2")(x)


class Prefix(nn.Module):
    """[I, N, C] -> [I, N + 1, D]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.relu(Linear(2 * x.shape[-1], ("embed", "mlp"), name="fc1")(x))
        x = Linear(self.width, ("mlp", "embed"), name="fc2")(hidden)
        end = weight(self, "end", (self.width,), ("norm",), normal(self.width**-0.5), x.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(end, (x.shape[0], 1, self.width))], axis=1)


class Fuse(Fusing):
    """Levels [K, I, 1, N, C] -> tokens [I, N + 1, D] or [I, 0, D], bank [2J, I, N, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels = seen.levels[:, :, 0]
        align, prefix = (rematted(module, self.config.remat, scanned=False) for module in (Align, Prefix))
        bank = align(len(self.wiring.names), self.width, self.settings.structure, name="align")(levels)
        if not self.settings.prefix:
            return Fused(jnp.zeros((levels.shape[1], 0, self.width), levels.dtype), bank)
        return Fused(prefix(self.width, name="prefix")(levels[-1]), bank)
