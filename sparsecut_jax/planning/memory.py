"""Estimates the memory of a training step per chip from shapes alone: state and temporaries.

docs/plan.md explains the terms and states their error.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from sparsecut_jax.data.batches import slots_of, spec_of
from sparsecut_jax.models.parameters import flatten, matrices
from sparsecut_jax.planning.residuals import Residuals
from sparsecut_jax.runs.parameters import boxed_shapes, stage_dtypes
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks.registry import build_model

Sizes = Mapping[str, int]  # {mesh axis: size}


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes per chip.

    Attributes:
      parameters, optimizer, batch: the step's arguments.
      gradients: gradients of the trained parameters, twice with accumulation.
      activations: kept from the forward to the backward pass.
      working: other temporaries at the peak: a layer's intermediates, gathered weights, logits.
      code: the program, and padding of the arguments; 0 if unknown.
      allocated: everything that the compiler lists, which is more than its peak; 0 if unknown.
    """

    parameters: float
    optimizer: float
    batch: float
    gradients: float
    activations: float
    working: float
    code: float = 0.0
    allocated: float = 0.0

    @property
    def state(self) -> float:
        return self.parameters + self.optimizer + self.batch

    @property
    def temporary(self) -> float:
        return self.gradients + self.activations + self.working

    @property
    def total(self) -> float:
        return self.state + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Constants:
    """Number of copies of each term at the peak, by compiler; fitted to the first list of cases in
    tests/planning_cases.py.

    Attributes:
      layer: a layer's or block's intermediates, if the backward pass recomputes them.
      kept: the same, if they were kept.
      weights: a layer's weights, gathered over fsdp.
      logits: float32 logits of a chunk.
      words: the head's matrix, if it is trained; otherwise one copy, if it has to be gathered.
      last: a layer's intermediates during the loss.
      update: the trained parameters while the optimizer updates them.
    """

    layer: float
    kept: float
    weights: float
    logits: float
    words: float
    last: float
    update: float


CONSTANTS = {
    "gpu": Constants(layer=0.9, kept=1.0, weights=0.5, logits=2.5, words=0.1, last=0.0, update=1.0),
    "tpu": Constants(layer=0.9, kept=1.0, weights=1.45, logits=1.0, words=0.85, last=0.0, update=1.0),
    "cpu": Constants(layer=1.6, kept=1.0, weights=1.0, logits=1.7, words=5.5, last=1.0, update=3.0),
}


class Parameters:
    """The parameters of a config in one of its stages, and their bytes per chip on a mesh."""

    def __init__(self, cfg: Config, name: str):
        """cfg: resolved for its platform, with no "auto" settings left."""
        model, patterns = build_model(dataclasses.replace(cfg, attention="xla")), cfg.stages[name].trainable
        self.boxed = boxed_shapes(model, cfg.data.max_images)
        boxes = flatten(self.boxed)
        self.shapes = {path: box.unbox().shape for path, box in boxes.items()}
        self.axes = {path: box.names for path, box in boxes.items()}
        self.dtype_of = stage_dtypes(cfg, name, matrices(self.boxed))
        self.trained = lambda path: any(re.fullmatch(pattern, path) for pattern in patterns)
        self._specs: dict[tuple[int, ...], dict[str, Any]] = {}

    def specs(self, sizes: Sizes) -> dict[str, Any]:
        """{path: PartitionSpec}. Raises UserError if a parameter cannot be sharded on a mesh of these sizes."""
        key = tuple(sizes[axis] for axis in sharding.MESH_AXES)
        if key not in self._specs:
            mesh = AbstractMesh(key, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(key))
            placed = flatten(sharding.param_shardings(self.boxed, mesh))
            self._specs[key] = {path: sharding_.spec for path, sharding_ in placed.items()}
        return self._specs[key]

    def local(self, sizes: Sizes, wanted: Callable[[str], bool] = lambda path: True, gathered: str = "") -> float:
        """Bytes per chip of the parameters whose path is `wanted`.

        gathered: a dtype; if given, count them cast to it and gathered over fsdp, as a layer uses them.
        """
        total = 0.0
        for path, spec in self.specs(sizes).items():
            if wanted(path):
                axes = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
                ways = math.prod(sizes[axis] for axis in axes if not (gathered and axis == "fsdp"))
                dtype = jnp.dtype(gathered) if gathered else self.dtype_of(path)
                total += math.prod(self.shapes[path]) * dtype.itemsize / ways
        return total

    def trains(self, part: str) -> bool:
        """Whether any parameter of a part ("vision", "fusion" or "llm") is trained."""
        return any(self.trained(path) for path in self.shapes if path.startswith(f"{part}/"))


def estimate(
    cfg: Config,
    name: str,
    sizes: Sizes,
    platform: str,
    parameters: Parameters | None = None,
    residuals: Residuals | None = None,
) -> Bytes:
    """Bytes per chip in stage `name` on a mesh of `sizes`. Raises UserError if a parameter cannot be sharded on it.

    Args:
      cfg: resolved for `platform`, with no "auto" settings left.
      name: the stage.
      sizes: {mesh axis: size}.
      platform: "tpu", "gpu" or "cpu"; selects the constants.
      parameters, residuals: those of the stage, if already known.
    """
    stage, constants, parameters = cfg.stages[name], CONSTANTS[platform], parameters or Parameters(cfg, name)
    shards, tensor = sharding.shards("batch", sizes), sizes["tensor"]
    rows, itemsize = stage.batch_size / stage.accumulate / shards, jnp.dtype(cfg.dtype).itemsize
    residuals = residuals or Residuals(cfg, name, tensor)

    # kept from forward to backward
    joined = parameters.trains("fusion") or parameters.trains("vision")
    activations = (1 + joined) * residuals.bank * rows  # and its cotangent
    for kept in (residuals.decoder, residuals.encoder):
        activations += kept.each * rows + kept.copies / sizes["fsdp"]

    # the peak of the backward pass: in an LLM layer, in the loss, or in a block of the tower
    copies = lambda remat: constants.kept if remat == "none" else constants.layer
    whole = residuals.layer * rows
    in_layers = lambda path: path.startswith("llm/") and "layers" in parameters.axes[path]
    weights = parameters.local(sizes, in_layers, cfg.dtype) / cfg.llm.layers
    in_layer = copies(cfg.llm.remat) * whole + constants.weights * weights
    words = cfg.llm.vocab_size * cfg.llm.width * itemsize / tensor
    moving = any({"vocab", "embed"} == set(axes) and parameters.trained(p) for p, axes in parameters.axes.items())
    logits = rows * min(cfg.loss_chunk, stage.seq_len) * cfg.llm.vocab_size / tensor * 4
    in_loss = constants.logits * logits + (constants.words if moving else sizes["fsdp"] > 1) * words
    in_loss += constants.last * whole
    in_block = copies(cfg.vision.remat) * residuals.block * rows if parameters.trains("vision") else 0.0
    working = max(in_layer, in_loss, in_block)

    trained = parameters.local(sizes, parameters.trained)
    gradients = trained * (2 if stage.accumulate > 1 else 1)
    update = max(0.0, constants.update * trained - gradients - activations - working)
    batch = spec_of(cfg, stage.batch_size, stage.seq_len, slots_of(cfg, name))
    return Bytes(
        parameters=parameters.local(sizes),
        optimizer=2 * trained,
        batch=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) / shards,
        gradients=gradients,
        activations=activations,
        working=working + update,
    )
