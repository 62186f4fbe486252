"""What this machine can do at most: products a second and bytes a second, measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

TRIES = 6  # the best counts
SIDE = {"cpu": 2048}  # of the square matrices; elsewhere 8192
NUMBERS = {"cpu": 2**25}  # float32, that are read and written; elsewhere 2^28


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of all devices together: FLOP/s of matrix products, bytes/s read and written."""

    flops: float
    bandwidth: float


def measure(dtype: jnp.dtype, mesh: jax.sharding.Mesh) -> Peak:
    """Of the devices of `mesh`, for matrices of `dtype`."""
    count, platform = mesh.size, mesh.devices.flat[0].platform
    side, numbers = SIDE.get(platform, 8192), NUMBERS.get(platform, 2**28)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    ones = lambda *shape, dtype: jax.jit(lambda: jnp.ones((count, *shape), dtype), out_shardings=spread)()
    matrices, many = ones(side, side, dtype=dtype), ones(numbers, dtype=jnp.float32)
    return Peak(
        flops=count * 2.0 * side**3 / best(jax.jit(lambda x: x @ x), matrices),
        bandwidth=count * 8.0 * numbers / best(jax.jit(lambda x: x + 1), many),
    )


def best(function: Callable, *args: jax.Array) -> float:
    """Seconds of the fastest of a few calls, compilation left out."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
