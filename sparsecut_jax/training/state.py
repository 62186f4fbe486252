"""The initial state of a run: fresh parameters in their shardings, parts of another run, or shapes for a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sparsecut_jax.models.parameters import split
from sparsecut_jax.runtime import sharding
from sparsecut_jax.types import TrainState


def abstract_state(
    abstract: Any, trainable: tuple[str, ...], tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The train state of a stage as shapes and shardings; moments are sharded like their parameters."""
    moving, _ = split(abstract, trainable)
    whole = sharding.replicated(mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    opt_state = optax.tree_map_params(
        tx,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, moving),
        moving,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )
    return TrainState(scalar, abstract, opt_state, scalar, scalar)


def begin_stage(
    abstract: TrainState, params: Any, trainable: tuple[str, ...], tx, step: int, skipped: int
) -> TrainState:
    """State at the first step of a stage: the given parameters in the stage's dtypes, and a fresh optimizer."""
    params = jax.tree.map(lambda leaf, target: leaf.astype(target.dtype), params, abstract.params)
    moving, _ = split(params, trainable)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(moving)
    place = lambda value: jax.device_put(jnp.int32(value), abstract.step.sharding)
    return TrainState(place(step), params, opt_state, place(skipped), place(0))
