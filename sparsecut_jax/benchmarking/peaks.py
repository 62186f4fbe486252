"""Measures the peak FLOP/s and memory bandwidth of this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TRIES = 6  # calls, of which the fastest counts
SIDE = {"cpu": 2048}  # side of the square matrices of the matmul; 8192 on other platforms
ROWS = {"cpu": 2**15}  # rows, of 4096 columns, of the matrix-vector product; 2^16 on other platforms


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of all devices together: FLOP/s of a matmul, and bytes/s that a matrix-vector product reads."""

    flops: float
    bandwidth: float


def measure(dtype: jnp.dtype, mesh: jax.sharding.Mesh) -> Peak:
    """The peaks of the devices of `mesh`, for matrices of `dtype`."""
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
    """Seconds of the fastest of a few calls, without compilation."""
    return min(seconds(TRIES, function, *args)[1:])


def seconds(times: int, function: Callable, *args: Any) -> list[float]:
    """Seconds of the first call, which compiles, and of `times` more."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        taken.append(time.perf_counter() - began)
    return taken
