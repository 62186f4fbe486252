"""The floors of timed parts: the work and traffic that are necessary.

They are matmuls with weights and of attention (planning/work.py), the loss of target tokens, one read or write of weights
and of the matmuls' inputs and outputs, and Adam's state. Recomputation is left out.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsecut_jax.models.llm import Cache
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.planning import generation, work
from sparsecut_jax.settings import Config

OF = {"tower": ("vision",), "encode": ("vision", "fusion")}  # parts of planning/work.py


@dataclasses.dataclass(frozen=True)
class Floor:
    """FLOPs and bytes of a call on all devices. model: model FLOPs, as MFU counts them."""

    flops: float
    bytes: float
    model: float


def of_training(cfg: Config, name: str, shapes: work.Shapes, part: str, predicted: float, trained: int) -> Floor:
    """The floor of a part of the training step, of a whole batch.

    Args:
      cfg, name, shapes: see `work.products`.
      part: "tower", "encode", "forward", "gradient" or "step".
      predicted: share of the positions that are target tokens.
      trained: numbers that the optimizer updates.
    """
    stage = cfg.stages[name]
    products = work.products(cfg, name, shapes, stage.batch_size, stage.seq_len, again=False)
    products = [p for p in products if p.part in OF.get(part, work.PARTS)]
    more = (lambda p: p.more) if part in ("gradient", "step") else lambda p: 0.0
    # Only target tokens need a loss; model FLOPs include it for every position.
    needed = lambda p: predicted if p.part == "loss" else 1.0
    moved = sum((p.moved * needed(p) + p.weights) * (1 + more(p)) for p in products) * _itemsize(cfg)
    return Floor(
        flops=sum(p.flops * (1 + more(p)) * needed(p) for p in products),
        bytes=moved + (work.UPDATE * 4 * trained if part == "step" else 0),
        model=sum(p.flops * (1 + more(p)) for p in products),
    )


def of_prefill(cfg: Config, name: str, shapes: work.Shapes, rows: int) -> Floor:
    """The floor of reading `rows` whole sequences, whose images are encoded, with logits of one position each."""
    products = generation.of_prefill(cfg, name, shapes, rows, cfg.stages[name].seq_len)
    products = [p for p in products if p.part in ("llm", "loss")]
    flops = sum(p.flops for p in products)
    return Floor(flops, sum(p.moved + rows * p.weights for p in products) * _itemsize(cfg), flops)


def of_decode(model: SparseCut, shapes: work.Shapes, cache: Cache) -> Floor:
    """The floor of one more token in every row of a cache, all of which is read: also what injections keep beside it."""
    products = generation.of_decode(model, shapes, cache)
    flops = sum(p.flops for p in products)
    read = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v, cache.sources)))
    return Floor(flops, len(cache.positions) * sum(p.weights for p in products) * model.dtype.itemsize + read, flops)


def _itemsize(cfg: Config) -> int:
    return jnp.dtype(cfg.dtype).itemsize
