"""Converts between the rows that each process holds and global arrays; a single process holds all rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def rows_here(placed: Sharding, count: int) -> np.ndarray:
    """int64[n], sorted: which of `count` rows, sharded as in `placed`, are on the devices of this process."""
    blocks = placed.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[block] for block in blocks]))


def place(tree: Any, placed: Sharding, rows: np.ndarray, count: int) -> Any:
    """Global arrays [count, ...] sharded as in `placed`, from arrays [n, ...] of this process's rows (`rows_here`)."""

    def leaf(x: np.ndarray) -> jax.Array:
        def block(where: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = where[0].indices(count)
            at = int(np.searchsorted(rows, start))
            return x[at : at + stop - start]

        return jax.make_array_from_callback((count, *x.shape[1:]), placed, block)

    return jax.tree.map(leaf, tree)


def filled(rows: np.ndarray, count: int) -> np.ndarray:
    """[n, ...] with rows of zeros behind, up to [count, ...]: arrays of one shape need one compilation."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def fetch(x: jax.Array) -> np.ndarray:
    """A whole global array as numpy, on every process. All processes must call it."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def gather(x: np.ndarray) -> np.ndarray:
    """Stacks [...] of every process into [processes, ...]. All processes must call it."""
    return multihost_utils.process_allgather(x) if jax.process_count() > 1 else x[None]
