"""A way of injecting, bound to one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsecut_jax.models.interfaces import Here, Sources, Wiring
from sparsecut_jax.models.ways import INJECTING, own_settings
from sparsecut_jax.settings import InjectingConfig


class Injection:
    """A way of injecting, in one layer: which of its functions act, and on what.

    Layers without sources compute what the others do and discard it: one body serves all layers.

    Attributes:
      way: module in models/injecting; settings: its own.
      here: the sources in this layer.
      site: int32[], the layer's number among those that have sources, -1 for the others.
    """

    def __init__(self, wiring: Wiring, config: InjectingConfig, sources: Sources, index: jax.Array, route: jax.Array):
        self.way = INJECTING[wiring.injecting]
        self.settings = own_settings(config, wiring.injecting, INJECTING)
        self.site = jnp.asarray(wiring.sites)[index]
        self.here = Here(
            sources.bank,
            route,
            sources.image_start,
            sources.own,
            sources.after,
            {name: self._of_site(weight) for name, weight in sources.weights.items()},
            sources.first,
            wiring.position,
        )

    def _of_site(self, x: jax.Array) -> jax.Array:
        """[J, ...] -> [...], this layer's row."""
        return jax.lax.dynamic_index_in_dim(x, jnp.maximum(self.site, 0), keepdims=False)

    def at(self, where: str, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """x after the way's function "before" or "after", and its ratios; x itself if it has none."""
        function = getattr(self.way, where, None)
        return (x, None) if function is None else function(self.settings, x, self.here)

    def attends(self) -> bool:
        return hasattr(self.way, "attend")

    def memory(self, keys: Callable, values: Callable) -> Any:
        """The layer's memory, from its sources; `keys` and `values` as in models/interfaces.py."""
        return self.way.memory(self.settings, keys, values, self.here)

    def stored(self, memories: Any) -> Any:
        """The layer's memory, from those of all sites [J, B, ...]."""
        return jax.tree.map(self._of_site, memories)

    def attend(self, q: jax.Array, memory: Any) -> jax.Array:
        """What is added to attention's output, [B, T, Q, H]; zeros in layers without sources."""
        return jnp.where(self.site >= 0, self.way.attend(self.settings, q, memory, self.here), 0)
