"""Measures what `config.fusion.norm_levels` standardises the levels of the tower by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparsecut_jax.data.parts import Split
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.runs.features import batched
from sparsecut_jax.runs.setup import Data
from sparsecut_jax.runtime import placing, sharding
from sparsecut_jax.text.conversation import images_of
from sparsecut_jax.types import BadSample, UserError

PICTURES = 512  # that are measured, evenly spread over the training rows
AT_ONCE = 16  # pictures that a device encodes together
LEAST = 1e-6  # a channel's standard deviation; 0 would say that it was never measured


def with_level_norm(params: Any, model: SparseCut, data: Data, mesh: Mesh) -> Any:
    """Parameters with mean and standard deviation of every channel of every level; as they are if they have these already.

    Raises UserError if no picture can be read.
    """
    current = params["fusion"]["norm_levels"]
    if placing.fetch(current["std"]).any():
        return params
    encode = jax.jit(lambda params, views: model.apply({"params": params}, views[:, None], method="levels"))
    at_once = AT_ONCE * sharding.data_parallel(mesh)
    count, total, squares = 0, 0.0, 0.0
    for views in batched(_pictures(data), at_once):
        placed = jax.device_put(placing.filled(np.stack(views), at_once), sharding.replicated(mesh))
        levels = placing.fetch(encode(params, placed))[:, : len(views)].astype(np.float64)  # [K, n, V, N, C]
        count += levels[0, ..., 0].size
        total, squares = total + levels.sum((1, 2, 3)), squares + np.square(levels).sum((1, 2, 3))
    if not count:
        raise UserError("config.fusion.norm_levels needs pictures to measure, but no training picture can be read")
    mean = total / count
    measured = {"mean": mean, "std": np.sqrt(np.maximum(squares / count - mean**2, LEAST**2))}
    placed = {name: jax.device_put(measured[name].astype(np.float32), current[name].sharding) for name in current}
    return {**params, "fusion": {**params["fusion"], "norm_levels": placed}}


def _pictures(data: Data) -> Iterator[np.ndarray]:
    """The first picture of some training rows, as training reads it."""
    rows = Split(tuple(data.source.train.values()))
    for number in np.unique(np.linspace(0, len(rows) - 1, PICTURES).astype(int)):
        part, local = rows.find(int(number))
        with contextlib.suppress(BadSample):
            for entry in images_of(part.row(local))[:1]:
                yield data.pictures.read(part, entry)
