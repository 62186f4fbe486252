"""A way of injecting, bound to one layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsecut_jax.models.interfaces import Here, Sources, Wiring
from sparsecut_jax.models.ways import INJECTING, own_settings
from sparsecut_jax.settings import InjectingConfig


class Injection:
    """A way of injecting, in one layer: which of its functions act, and on what.

    One compiled body serves all layers. A way with weights runs under a condition there, only where the layer has sources;
    one without, as `add`, runs everywhere and finds zeros where there are none, which is cheaper than a branch.

    Attributes:
      way: module in models/injecting; settings: its own.
      here: the sources in this layer.
      site: int32[], the layer's number among those that have sources, -1 for the others.
    """

    def __init__(self, wiring: Wiring, config: InjectingConfig, sources: Sources, index: jax.Array, route: jax.Array):
        self.way = INJECTING[wiring.injecting]
        self.settings = own_settings(config, wiring.injecting, INJECTING)
        self.site = jnp.asarray(wiring.sites)[index]
        # Read by planning/jaxprs.py: how often the condition holds.
        self.scope = f"{wiring.site_count}_of_{len(wiring.entering)}_layers"
        self.here = Here(
            sources.bank,
            route,
            sources.image_start,
            sources.own,
            sources.after,
            {name: self._of_site(weight) for name, weight in sources.weights.items()},
            sources.first,
            position=wiring.position,
        )

    def _of_site(self, x: jax.Array) -> jax.Array:
        """[J, ...] -> [...], this layer's row."""
        return jax.lax.dynamic_index_in_dim(x, jnp.maximum(self.site, 0), keepdims=False)

    def _in_sites(self, function: Callable, otherwise: Callable, *args: Any) -> Any:
        """function(*args) in layers that have sources, and otherwise(*args), of the same shapes, in the others."""
        if not self.here.weights:
            return function(*args)
        with jax.named_scope(self.scope):
            return jax.lax.cond(self.site >= 0, function, otherwise, *args)

    def remember(self, stored: Any, keys: Callable | None = None, values: Callable | None = None) -> None:
        """Puts the layer's memory into `here`: that of its site in `stored`, [J, B, ...], or a new one if that is None.

        keys, values: as in models/interfaces.py, for ways that attend.
        """
        if stored is not None:
            memory = jax.tree.map(self._of_site, stored)
        elif keys is not None:  # not under the condition: adapters of the layer's matrices may draw random numbers
            memory = self.way.memory(self.settings, keys, values, self.here)
        else:
            make = lambda: self.way.memory(self.settings, None, None, self.here)
            memory = self._in_sites(make, lambda: _zeros(jax.eval_shape(make)))
        self.here = self.here.replace(memory=memory)

    @property
    def remembers(self) -> bool:
        return hasattr(self.way, "memory")

    @property
    def attends(self) -> bool:
        return hasattr(self.way, "attend")

    def at(self, where: str, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """x after the way's function `where`, "before" or "after", and its ratios; (x, None) if the way has no such function."""
        if not hasattr(self.way, where):
            return x, None
        act = functools.partial(getattr(self.way, where), self.settings, here=self.here)
        return self._in_sites(act, lambda x: (x, _zeros(jax.eval_shape(act, x)[1])), x)

    def attend(self, q: jax.Array) -> jax.Array:
        """What is added to attention's output, [B, T, Q, H]; zeros in layers without sources."""
        act = functools.partial(self.way.attend, self.settings, here=self.here)
        return self._in_sites(act, lambda q: _zeros(jax.eval_shape(act, q)), q)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
