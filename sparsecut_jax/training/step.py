"""The training step: one jitted, donated function from (state, batch) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsecut_jax.models.parameters import Params, join, split
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.types import Batch, TrainState


def make_gradients(model: SparseCut, matrices: Mapping[str, bool], accumulate: int, loss_chunk: int) -> Callable:
    """Function (trainable, frozen, batch, key) -> (loss sum, count, float32 gradient of the sum, shortcut ratios).

    Only `trainable`, a flat dict, is differentiated, with respect to its matrices cast to the compute dtype: in bfloat16
    the gradients are half as large. With `accumulate` > 1 the rows are processed in that many micro-batches; since losses
    and gradients are sums, the result is that of the whole batch.
    """
    cast = lambda flat: {k: v.astype(model.dtype) if matrices[k] else v for k, v in flat.items()}
    whole = lambda grads: jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        params = join(frozen, trainable)
        total, count, seen = model.apply({"params": params}, batch, loss_chunk, rngs={"dropout": key}, method="loss")
        return total + seen["aux_loss"] * count, (count, seen.get("shortcut_ratio", jnp.zeros((0, 1))))

    def gradients(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        def one(batch: Batch, key: jax.Array):
            values, grads = jax.value_and_grad(loss_fn, has_aux=True)(cast(trainable), frozen, batch, key)
            total, (count, ratio) = values
            return total, count, whole(grads), ratio

        if accumulate == 1:
            return one(batch, key)
        # Strided, so that each micro-batch has rows on every device.
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), key))
        add = lambda carry, each: (jax.tree.map(jnp.add, carry, one(each[0], each[1])), None)
        (total, count, grads, ratio), _ = jax.lax.scan(add, zero, (micro, jax.random.split(key, accumulate)))
        return total, count, grads, ratio / accumulate

    return gradients


def make_train_step(
    model: SparseCut,
    matrices: Mapping[str, bool],
    stage: StageConfig,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    first_step: int,
    seed: int,
    loss_chunk: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The training step of one stage, to be jitted.

    An update whose loss or gradient is not finite, or whose batch has no target token, is skipped: parameters and Adam's
    moments stay, step and schedule advance. `state.streak` counts consecutive skipped updates.

    Args:
      model: the model.
      matrices: {path: whether the parameter is a matrix}, see `models.parameters.matrices`.
      stage: the stage's settings.
      tx: the optimizer, without learning rate (`optimizer.adamw`).
      learning_rate: schedule over the steps of the stage.
      first_step: step of the run at which the stage begins.
      seed: of the dropout keys.
      loss_chunk: positions per row whose logits exist at once.
    """
    gradients = make_gradients(model, matrices, stage.accumulate, loss_chunk)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        moving, frozen = split(state.params, stage.trainable)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        total, count, grads, ratio = gradients(moving, frozen, batch, key)
        with jax.named_scope("update"):
            loss = total / jnp.maximum(count, 1)
            grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)
            norm = optax.tree.norm(grads)
            good = jnp.isfinite(loss) & jnp.isfinite(norm) & (count > 0)

            updates, opt_state = tx.update(grads, state.opt_state, moving)
            lr = learning_rate(state.step - first_step)
            moved = optax.apply_updates(moving, jax.tree.map(lambda u: -lr * u, updates))
            keep = lambda new, old: jnp.where(good, new, old)
            bad = 1 - good.astype(jnp.int32)
            state = TrainState(
                step=state.step + 1,
                params=join(frozen, jax.tree.map(keep, moved, moving)),
                opt_state=jax.tree.map(keep, opt_state, state.opt_state),
                skipped=state.skipped + bad,
                streak=(state.streak + 1) * bad,
            )
        metrics = {
            "loss": loss,
            "supervised_tokens": count,
            "tokens": jnp.sum(batch.segments > 0),
            "grad_norm": norm,
            "grad_norm_by_part": opt.part_norms(grads),
            "lr": lr,
            "shortcut_ratio": ratio,
            "skipped": state.skipped,
            "streak": state.streak,
        }
        return state, metrics

    return train_step
