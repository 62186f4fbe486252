"""The part "fusion" of a model: a way of fusing, and the weights of its way of injecting under "inject"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Question, Seen, Wiring
from sparsecut_jax.models.layers import weight, zeros
from sparsecut_jax.models.ways import FUSING, INJECTING, own_settings, view_count
from sparsecut_jax.settings import FusionConfig, LLMConfig


class SiteWeights(nn.Module):
    """Parameters of a way of injecting: {name: [J, ...]}, a row for every layer that has sources."""

    injecting: str
    sites: int
    llm: LLMConfig

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return INJECTING[self.injecting].weights(self, self.sites, self.llm)


class LevelNorm(nn.Module):
    """Levels [K, I, V, N, C] with mean 0 and standard deviation 1 in each of their channels.

    `mean` and `std`, float32[K, C], are measured once (runs/level_norm.py) and not trained; as long as `std` is 0, the
    levels stay as they are.
    """

    @nn.compact
    def __call__(self, levels: jax.Array) -> jax.Array:
        count, *middle, width = levels.shape

        def statistic(name: str) -> jax.Array:
            value = jax.lax.stop_gradient(weight(self, name, (count, width), ("levels", "norm"), zeros))
            return value.reshape(count, *[1] * len(middle), width)

        mean, std = statistic("mean"), statistic("std")
        return jnp.where(std > 0, (levels - mean) / jnp.where(std > 0, std, 1), levels).astype(levels.dtype)


class Fusion(nn.Module):
    """Levels [K, I, V, N, C] -> Fused, by the way of fusing that the config names. Its parameters stand directly in "fusion"."""

    config: FusionConfig
    wiring: Wiring
    llm: LLMConfig
    attention: str = "xla"

    def setup(self) -> None:
        settings = own_settings(self.config, self.config.name, FUSING)
        self.way = FUSING[self.config.name].Fuse(settings, self.config, self.wiring, self.llm.width, self.attention)
        nn.share_scope(self, self.way)
        if self.config.norm_levels:
            self.norm_levels = LevelNorm()
        if hasattr(INJECTING[self.wiring.injecting], "weights"):
            self.inject = SiteWeights(self.wiring.injecting, self.wiring.site_count, self.llm)

    def __call__(self, levels: jax.Array, question: Question | None = None, slots: int = 1) -> Fused:
        """slots: image slots of a row (M). Raises ValueError for a wrong number of views."""
        if levels.shape[2] != view_count(self.wiring):
            raise ValueError(
                f"fusion {self.config.name!r} reads {view_count(self.wiring)} views, got {levels.shape[2]}"
            )
        if self.config.norm_levels:
            levels = self.norm_levels(levels)
        fused = self.way(Seen(levels, slots), question)
        return fused.replace(aux_loss=jnp.asarray(fused.aux_loss, jnp.float32))

    def site_weights(self) -> dict[str, jax.Array]:
        """{name: [J, ...]} of the way of injecting; {} if it has none."""
        return self.inject() if hasattr(INJECTING[self.wiring.injecting], "weights") else {}
