"""Next-token cross-entropy over the supervised tokens of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsecut_jax.types import Batch


def cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p over the tokens with loss_mask 1, each predicted from the position before it, and their count.

    Sums, so that micro-batches and devices add up to the mean over the whole batch.

    Args:
      logits: float32[B, T, W].

    Returns:
      (sum, count), both float32[].
    """
    mask = batch.loss_mask[:, 1:].astype(jnp.float32)
    logits, targets = logits[:, :-1], batch.tokens[:, 1:]
    # A masked sum instead of take_along_axis: a gather over a vocabulary that is split would collect the logits.
    words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    right = jnp.sum(jnp.where(words == targets[..., None], logits, 0), axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - right
    # where, not a product: what a padded position's loss is must not matter
    return jnp.sum(jnp.where(mask > 0, nll, 0)), jnp.sum(mask)
