"""The least time a step can take on a topology: its products at the peak rate, its bytes through memory, its bytes over
the links. The largest of the three is the roofline; all are from stated rates (planning/hardware.py).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from sparsecut_jax import sharding
from sparsecut_jax.planning.flops import Product
from sparsecut_jax.planning.hardware import Topology
from sparsecut_jax.planning.memory import Parameters, Sizes
from sparsecut_jax.settings import Config

UPDATE = 7  # float32 numbers that Adam reads (p, m, v, g) and writes (p, m, v) for each trained parameter


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step."""

    compute: float  # with what rematerialisation computes again
    memory: float
    links: float
    network: float  # between slices or nodes

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def bound(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(
    cfg: Config, name: str, topology: Topology, sizes: Sizes, found: list[Product], parameters: Parameters
) -> Roofline:
    """Of the whole batch of stage `name`; `found` are its products, all rows together."""
    chip, stage, chips = topology.chip, cfg.stages[name], topology.chips
    itemsize, turns = jnp.dtype(cfg.dtype).itemsize, stage.accumulate
    trained = parameters.local(sizes, parameters.trained)
    flops = sum(p.flops * (1 + p.more + p.again) for p in found)
    moved = UPDATE * trained
    for p in found:
        weights = p.weights / sizes["tensor"] * turns
        moved += (1 + p.more + p.again) * itemsize * (p.moved / chips + weights)
    through = {"links": 0.0, "network": 0.0}
    for axis, bytes_in in traffic(cfg, name, sizes, parameters, found).items():
        through["network" if crosses(topology, sizes, axis) else "links"] += bytes_in
    return Roofline(
        compute=flops / chips / chip.flops,
        memory=moved / chip.bandwidth,
        links=through["links"] / chip.link,
        network=through["network"] / chip.network,
    )


def traffic(cfg: Config, name: str, sizes: Sizes, parameters: Parameters, found: list[Product]) -> dict[str, float]:
    """Bytes that come into a chip in a step, by the mesh axis they cross.

    fsdp: weights are collected for forward and once more for backward, gradients summed and scattered, in every turn.
    data, replica: the gradients of a step are summed. tensor: activations are summed after attention and after the
    MLP, forward, backward and where forward is computed again.
    """
    turns, dtype = cfg.stages[name].accumulate, cfg.dtype
    share = lambda axis: (sizes[axis] - 1) / sizes[axis]
    parts = {p.part for p in found if p.more}
    backward = lambda path: path.split("/")[0] in parts
    gathered = parameters.local(sizes, gathered=dtype) + parameters.local(sizes, backward, dtype)
    gathered += parameters.local(sizes, parameters.trained, dtype)
    trained = parameters.local(sizes, parameters.trained)
    outputs = [
        p for p in found if p.path.endswith(("attention/out", "attention/out_kernel", "down/kernel", "fc2/kernel"))
    ]
    sums = sum(p.outputs * (1 + (p.more > 0) + p.again) for p in outputs)
    rows = math.prod(sizes[axis] for axis in sharding.RULES["batch"])
    return {
        "fsdp": gathered * share("fsdp") * turns,
        "data": 2 * trained * share("data"),
        "replica": 2 * trained * share("replica"),
        "tensor": 2 * sums * jnp.dtype(dtype).itemsize / rows * share("tensor"),
    }


def crosses(topology: Topology, sizes: Sizes, axis: str) -> bool:
    """Whether an axis goes beyond a slice or node; the last axes of a mesh are laid closest together."""
    axes = sharding.MESH_AXES[sharding.MESH_AXES.index(axis) :]
    return topology.slices > 1 and math.prod(sizes[a] for a in axes) > topology.chips // topology.slices
