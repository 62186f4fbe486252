"""Global arrays from what each process holds of them, and back; in one process that is all of it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def rows_here(placed: Sharding, count: int) -> np.ndarray:
    """int64[n], sorted: which of `count` rows, split as `placed` says, are on the devices of this process."""
    blocks = placed.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[block] for block in blocks]))


def place(tree: Any, placed: Sharding, rows: np.ndarray, count: int) -> Any:
    """Arrays [n, ...] of the rows `rows_here` -> global arrays [count, ...], split over the devices as `placed` says."""

    def leaf(x: np.ndarray) -> jax.Array:
        def block(where: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = where[0].indices(count)
            at = int(np.searchsorted(rows, start))
            return x[at : at + stop - start]

        return jax.make_array_from_callback((count, *x.shape[1:]), placed, block)

    return jax.tree.map(leaf, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """All of a global array, on every process; all must ask."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def gather(x: np.ndarray) -> np.ndarray:
    """[...] of every process -> [processes, ...]; all must ask."""
    return multihost_utils.process_allgather(x) if jax.process_count() > 1 else x[None]
