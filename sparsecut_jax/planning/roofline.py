"""The roofline of a step on a topology: the largest of the times for its matmuls, memory traffic, interconnect traffic
and network traffic, each at the vendor's peak rate (planning/hardware.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from sparsecut_jax.planning.flops import Product
from sparsecut_jax.planning.hardware import Topology
from sparsecut_jax.planning.memory import Parameters, Sizes
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import Config

UPDATE = 7  # float32 numbers that Adam reads (p, m, v, g) and writes (p, m, v) for each trained parameter


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step."""

    compute: float  # recomputation included
    memory: float
    links: float  # interconnect within a slice or node
    network: float  # between slices or nodes

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def bound(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(
    cfg: Config, name: str, topology: Topology, sizes: Sizes, products: Sequence[Product], parameters: Parameters
) -> Roofline:
    """The roofline of a step of stage `name`; `products` are its matmuls over the whole batch."""
    chip, stage, chips = topology.chip, cfg.stages[name], topology.chips
    itemsize, micro_batches = jnp.dtype(cfg.dtype).itemsize, stage.accumulate
    trained = parameters.local(sizes, parameters.trained)
    flops = sum(p.flops * (1 + p.more + p.again) for p in products)
    moved = UPDATE * trained
    for p in products:
        weights = p.weights / sizes["tensor"] * micro_batches
        moved += (1 + p.more + p.again) * itemsize * (p.moved / chips + weights)
    through = {"links": 0.0, "network": 0.0}
    for axis, bytes_in in traffic(cfg, name, sizes, parameters, products).items():
        through["network" if crosses(topology, sizes, axis) else "links"] += bytes_in
    return Roofline(
        compute=flops / chips / chip.flops,
        memory=moved / chip.bandwidth,
        links=through["links"] / chip.link,
        network=through["network"] / chip.network,
    )


def traffic(
    cfg: Config, name: str, sizes: Sizes, parameters: Parameters, products: Sequence[Product]
) -> dict[str, float]:
    """Bytes that a chip receives in a step, by the mesh axis they cross.

    fsdp: weights are gathered for forward and again for backward, and gradients reduce-scattered, in every micro-batch.
    data, replica: the gradients of a step are all-reduced. tensor: what attention and MLPs return, a sum over heads or
    hidden units, is all-reduced in forward, backward and recomputation.
    """
    micro_batches, dtype = cfg.stages[name].accumulate, cfg.dtype
    share = lambda axis: (sizes[axis] - 1) / sizes[axis]
    parts = {p.part for p in products if p.more}
    backward = lambda path: path.split("/")[0] in parts
    gathered = parameters.local(sizes, gathered=dtype) + parameters.local(sizes, backward, dtype)
    gathered += parameters.local(sizes, parameters.trained, dtype)
    trained = parameters.local(sizes, parameters.trained)
    summed = lambda p: any(parameters.axes[p.path][axis] in ("heads", "mlp") for axis in p.contracted)
    sums = sum(p.outputs * (1 + (p.more > 0) + p.again) for p in products if summed(p))
    rows = math.prod(sizes[axis] for axis in sharding.RULES["batch"])
    return {
        "fsdp": gathered * share("fsdp") * micro_batches,
        "data": 2 * trained * share("data"),
        "replica": 2 * trained * share("replica"),
        "tensor": 2 * sums * jnp.dtype(dtype).itemsize / rows * share("tensor"),
    }


def crosses(topology: Topology, sizes: Sizes, axis: str) -> bool:
    """Whether a mesh axis spans several slices or nodes; the last axes of a mesh are the innermost."""
    axes = sharding.MESH_AXES[sharding.MESH_AXES.index(axis) :]
    return topology.slices > 1 and math.prod(sizes[a] for a in axes) > topology.chips // topology.slices
