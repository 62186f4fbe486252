"""What this machine can do at most: products a second and bytes a second, measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TRIES = 6  # the best counts
SIDE = {"cpu": 2048}  # of the square matrices; elsewhere 8192
ROWS = {"cpu": 2**15}  # of the matrix of 4096 columns whose product with a vector is timed; elsewhere 2^16


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of all devices together: FLOP/s of products of matrices, bytes/s read by the product of one with a vector."""

    flops: float
    bandwidth: float


def measure(dtype: jnp.dtype, mesh: jax.sharding.Mesh) -> Peak:
    """Of the devices of `mesh`, for matrices of `dtype`."""
    count, platform = mesh.size, mesh.devices.flat[0].platform
    side, rows = SIDE.get(platform, 8192), ROWS.get(platform, 2**16)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    ones = lambda *shape, dtype: jax.jit(lambda: jnp.ones((count, *shape), dtype), out_shardings=spread)()
    matrices, many, vector = ones(side, side, dtype=dtype), ones(rows, 4096, dtype=dtype), ones(4096, dtype=dtype)
    return Peak(
        flops=count * 2.0 * side**3 / best(jax.jit(lambda x: x @ x), matrices),
        bandwidth=many.nbytes / best(jax.jit(lambda x, v: jnp.einsum("gij,gj->gi", x, v)), many, vector),
    )


def best(function: Callable, *args: jax.Array) -> float:
    """Seconds of the fastest of a few calls, compilation left out."""
    return min(seconds(TRIES, function, *args)[1:])


def seconds(times: int, function: Callable, *args: Any) -> list[float]:
    """Of a first call, which compiles, and of so many more."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - began)
    return found
