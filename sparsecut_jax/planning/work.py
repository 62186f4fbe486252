"""The work of a training step: its FLOPs by part of the model, and the roofline of the time that it takes on a topology.

FLOPs are read from the traced model: 2 x rows x inputs x outputs of every matmul. The real loss is traced by shapes alone
and its jaxpr is walked, so a module needs no entry here, and names of parameters do not matter. Attention counts in full
rather than its causal half, and the loss at every position. Norms, activations, softmax, rotary embeddings and the
optimizer are left out: together they stay below 3 % of what the compiler counts (tests/test_planning_work.py).

The backward pass of a matmul has one more of the same size for each operand that depends on a trained parameter. What is
computed again for it depends on what a remat policy keeps, and is read from the jaxpr of the gradient.

The roofline is the largest of the times for matmuls, memory traffic, interconnect traffic and network traffic, each at the
vendor's peak rate (runtime/hardware.py).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsecut_jax.data.batches import slots_of, spec_of
from sparsecut_jax.models.parameters import unflatten
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.planning.jaxprs import Product, traced
from sparsecut_jax.planning.memory import Parameters, Sizes
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.runtime.hardware import Topology
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch

PARTS = ("vision", "fusion", "llm", "loss")
Shapes = dict[str, tuple[int, ...]]
AGAIN = "rematted_computation"  # jax.checkpoint's name of what the backward pass computes again
UPDATE = 7  # float32 numbers that Adam reads (p, m, v, g) and writes (p, m, v) for each trained parameter


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one part."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0  # forward matmuls recomputed for backward; not part of model FLOPs

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    @property
    def model(self) -> float:
        return self.forward + self.backward


def by_part(products: Iterable[Product]) -> dict[str, Work]:
    """{part: FLOPs}, and their sum as "total"."""
    parts = dict.fromkeys(PARTS, Work())
    for p in products:
        parts[p.part] += Work(p.flops, p.flops * p.more, p.flops * p.again)
    return {**parts, "total": sum(parts.values(), Work())}


def flops_of_batch(cfg: Config, name: str, shapes: Shapes, slots: int) -> Callable[[int], float]:
    """A function from sequence length to the model FLOPs of a batch of stage `name` with `slots` image slots."""
    cfg = cfg.with_stage(name, slots=slots)
    rows = cfg.stages[name].batch_size
    return functools.cache(lambda t: by_part(products(cfg, name, shapes, rows, t, again=False))["total"].model)


# --- the traced model ---


def products(
    cfg: Config, name: str, shapes: Shapes, rows: int, seq_len: int, again: bool = True
) -> tuple[Product, ...]:
    """The matmuls of `rows` sequences of `seq_len` positions in stage `name`.

    Args:
      cfg: resolved for its platform, with no "auto" settings left.
      name: the stage.
      shapes: {path of a parameter: its shape}.
      rows, seq_len: B and T.
      again: also tell what is computed again, for which the gradient is traced too.
    """
    cfg = dataclasses.replace(cfg, attention="xla")  # other backends compute a part of the scores, or hide them
    batch = spec_of(cfg, rows, seq_len, slots_of(cfg, name), most_segments=1)
    trainable = cfg.stages[name].trainable
    # What is hashed, to trace each function of shapes once: not a batch, which cannot be.
    inputs = tuple(shapes.items()), trainable, *_flat(batch)
    model, plain = build_model(cfg), build_model(backends.without_remat(cfg))
    matmuls = _forward(plain, *inputs)
    if again and model != plain:
        recomputed, whole = _recomputed(model, *inputs), collections.Counter()
        for p in matmuls:
            whole[p.part, p.path] += p.flops
        share = lambda p: recomputed[p.part, p.path] / whole[p.part, p.path]
        matmuls = tuple(dataclasses.replace(p, again=share(p)) for p in matmuls)
    if again and cfg.mesh.fsdp != 1 and cfg.mesh.tensor == 1:  # the logits, see models/losses.py
        twice = lambda p: p.part == "loss" and _is_trained(trainable, p.path)
        matmuls = tuple(dataclasses.replace(p, again=1.0) if twice(p) else p for p in matmuls)
    return matmuls


def _flat(batch: Batch) -> tuple[tuple, Any]:
    leaves, structure = jax.tree.flatten(batch)
    return tuple(leaves), structure


@functools.lru_cache(maxsize=256)
def _forward(model: SparseCut, *inputs: Any) -> tuple[Product, ...]:
    """The matmuls of the loss."""
    loss, arguments = _loss(model, *inputs)
    return tuple(traced(loss, *arguments))


@functools.lru_cache(maxsize=64)
def _recomputed(model: SparseCut, *inputs: Any) -> collections.Counter:
    """{(part, path of a weight): FLOPs that the backward pass computes again}"""
    loss, arguments = _loss(model, *inputs)
    flops: collections.Counter = collections.Counter()
    for p in traced(jax.grad(loss), *arguments) if arguments[0] else ():
        flops[p.part, p.path] += p.flops * (AGAIN in p.scope)
    return flops


def _loss(
    model: SparseCut, shapes: tuple, trainable: tuple[str, ...], leaves: tuple, structure: Any
) -> tuple[Callable, tuple[dict, dict, Batch]]:
    """The loss as a function of trained and other parameters and a batch, and the shapes of these."""
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes}
    moving = {path: leaf for path, leaf in params.items() if _is_trained(trainable, path)}
    frozen = {path: leaf for path, leaf in params.items() if path not in moving}

    def loss(moving: dict, frozen: dict, batch: Batch) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        variables = {"params": unflatten({**frozen, **moving})}
        total, _, seen = model.apply(variables, batch, batch.tokens.shape[1], rngs=rngs, method="loss")
        return total + seen["aux_loss"]

    return loss, (moving, frozen, jax.tree.unflatten(structure, leaves))


def _is_trained(trainable: tuple[str, ...], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in trainable)


# --- the roofline ---


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
    rows = sharding.shards("batch", sizes)
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
