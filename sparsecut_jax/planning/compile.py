"""Lowers the training step of a config for devices that are not present.

libtpu compiles for TPUs and runs on a CPU machine; jaxlib itself compiles for CPU devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from sparsecut_jax.data.batches import spec_of
from sparsecut_jax.models.parameters import matrices
from sparsecut_jax.models.sparsecut import build_model
from sparsecut_jax.runs.parameters import abstract_params, boxed_shapes, stage_dtypes
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.settings import Config
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state
from sparsecut_jax.training.step import make_train_step
from sparsecut_jax.types import Batch, TrainState

STEPS = 1000  # length of the schedule; only constants in the program depend on it


def abstract_batch(cfg: Config, name: str, mesh: jax.sharding.Mesh) -> Batch:
    """A batch of stage `name` as `jax.ShapeDtypeStruct`s with shardings on `mesh`."""
    stage, placed = cfg.stages[name], sharding.batch_sharding(mesh)
    more = {"most_segments": 0 if stage.batching == "packed" else 1, "sharding": placed}
    return spec_of(cfg, stage.batch_size, stage.seq_len, stage.slots or cfg.data.max_images, **more)


def lower_step(cfg: Config, name: str, devices: list[Any]) -> jax.stages.Lowered:
    """The jitted, donated step of stage `name` on a mesh of `devices`, ready to be compiled.

    Raises:
      UserError: the mesh does not fit the devices or the model, or the platform does not support a setting.
    """
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh), devices)
    cfg = backends.resolve(cfg, devices[0].platform)
    step, target = step_of(cfg, name, mesh)
    with jax.set_mesh(mesh):
        return step.lower(target, abstract_batch(cfg, name, mesh))


def step_of(cfg: Config, name: str, mesh: jax.sharding.Mesh) -> tuple[Any, TrainState]:
    """The jitted, donated step of stage `name`, and the shapes of its state. `cfg` has no "auto" settings left."""
    stage = cfg.stages[name]
    model = build_model(cfg, backends.compute_dtype(cfg), ("shortcut_ratio",))
    are_matrices = matrices(boxed_shapes(model, cfg.data.max_images))
    abstract = abstract_params(model, cfg, mesh, stage_dtypes(cfg, name, are_matrices))
    tx = opt.adamw(stage, are_matrices)
    target = state.abstract_state(abstract, stage.trainable, tx, mesh)
    step = make_train_step(model, are_matrices, stage, tx, opt.schedule(stage, STEPS), 0, cfg.seed, cfg.loss_chunk)
    return jax.jit(step, donate_argnums=0), target
