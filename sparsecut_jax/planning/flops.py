"""Model FLOPs of a training step, read from the traced model: 2 x rows x inputs x outputs of every matmul.

The real loss is traced by shapes alone and its jaxpr is walked, so a module needs no entry here, and names of parameters
do not matter. Attention counts in full rather than its causal half, and the loss at every position. Norms, activations,
softmax, rotary embeddings and the optimizer are left out: together they stay below 3 % of what the compiler counts
(tests/test_planning_flops.py).

The backward pass of a matmul has one more of the same size for each operand that depends on a trained parameter. What is
computed again for it depends on what a remat policy keeps, and is read from the jaxpr of the gradient.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sparsecut_jax.data.batches import spec_of
from sparsecut_jax.models.parameters import unflatten
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.planning.jaxprs import Product, traced
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch

PARTS = ("vision", "fusion", "llm", "loss")
Shapes = dict[str, tuple[int, ...]]
AGAIN = "rematted_computation"  # jax.checkpoint's name of what the backward pass computes again


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


def work(products: Iterable[Product]) -> dict[str, Work]:
    """{part: FLOPs}, and their sum as "total"."""
    by_part = dict.fromkeys(PARTS, Work())
    for p in products:
        by_part[p.part] += Work(p.flops, p.flops * p.more, p.flops * p.again)
    return {**by_part, "total": sum(by_part.values(), Work())}


def of_batch(cfg: Config, name: str, shapes: Shapes, slots: int) -> Callable[[int], float]:
    """A function from sequence length to the model FLOPs of a batch of stage `name` with `slots` image slots."""
    cfg = cfg.with_stage(name, slots=slots)
    rows = cfg.stages[name].batch_size
    return functools.cache(lambda t: work(products(cfg, name, shapes, rows, t, again=False))["total"].model)


# --- the traced model ---


def slots_of(cfg: Config, name: str) -> int:
    """Image slots per sequence (M)."""
    return cfg.stages[name].slots or cfg.data.max_images


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
    # Other backends compute a part of the scores, or hide them in a kernel.
    model = build_model(dataclasses.replace(cfg, attention="xla"))
    batch = spec_of(cfg, rows, seq_len, slots_of(cfg, name), most_segments=1)
    leaves, structure = jax.tree.flatten(batch)  # a batch itself cannot be hashed
    policies = {cfg.vision.remat, cfg.fusion.remat, cfg.llm.remat} - {"none", "auto"}
    trainable = cfg.stages[name].trainable
    matmuls = _products(model, tuple(shapes.items()), trainable, tuple(leaves), structure, again and bool(policies))
    if again and cfg.mesh.fsdp != 1 and cfg.mesh.tensor == 1:  # the logits, see models/losses.py
        twice = lambda p: p.part == "loss" and _is_trained(trainable, p.path)
        matmuls = tuple(dataclasses.replace(p, again=1.0) if twice(p) else p for p in matmuls)
    return matmuls


@functools.lru_cache(maxsize=256)
def _products(
    model: SparseCut, shapes: tuple, trainable: tuple[str, ...], leaves: tuple, structure: Any, again: bool
) -> tuple[Product, ...]:
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes}
    moving = {path: leaf for path, leaf in params.items() if _is_trained(trainable, path)}
    frozen = {path: leaf for path, leaf in params.items() if path not in moving}
    batch = jax.tree.unflatten(structure, leaves)

    def loss(moving: dict, frozen: dict, batch: Batch) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        variables = {"params": unflatten({**frozen, **moving})}
        total, _, seen = model.apply(variables, batch, batch.tokens.shape[1], rngs=rngs, method="loss")
        return total + seen["aux_loss"]

    forward = traced(loss, moving, frozen, batch)
    if not again or not moving:
        return tuple(forward)
    recomputed: dict[tuple, float] = collections.Counter()
    for p in traced(jax.grad(loss), moving, frozen, batch):
        recomputed[p.part, p.path] += p.flops * (AGAIN in p.scope)
    whole: dict[tuple, float] = collections.Counter()
    for p in forward:
        whole[p.part, p.path] += p.flops
    share = lambda p: recomputed[p.part, p.path] / whole[p.part, p.path]
    return tuple(dataclasses.replace(p, again=share(p)) for p in forward)


def _is_trained(trainable: tuple[str, ...], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in trainable)
