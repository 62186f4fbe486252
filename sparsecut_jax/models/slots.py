"""Where images stand in a row: reads and writes the runs of positions of its image slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsecut_jax.types import EMPTY_SLOT


def write_slots(
    hidden: jax.Array, values: jax.Array, image_start: jax.Array, add: bool, first: jax.Array | None = None
) -> jax.Array:
    """Writes (or adds) the tokens of every image to its run of positions.

    Uses one windowed update per slot rather than a scatter: under a mesh, a scatter made XLA all-gather the activations.
    An empty slot writes back what it read.

    Args:
      hidden: [B, T, D].
      values: [B, M, N, D].
      image_start: int32[B, M], first position of each run, -1 for an empty slot.
      add: whether to add to the hidden state rather than overwrite it.
      first: int32[], where in the row the T positions begin, if they are a part of it; the part may end within an image.

    Returns:
      [B, T, D] in the dtype of `hidden`; unchanged if N = 0, or if a whole row has T < N, as a short text without image.
    """
    if not values.shape[2]:
        return hidden
    if first is not None:
        return _write_part(hidden, values, image_start, add, first)
    if hidden.shape[1] < values.shape[2]:
        return hidden
    for m in range(values.shape[1]):
        hidden = jax.vmap(_write_slot, in_axes=(0, 0, 0, None))(
            hidden, values[:, m].astype(hidden.dtype), image_start[:, m], add
        )
    return hidden


def _write_part(hidden: jax.Array, values: jax.Array, image_start: jax.Array, add: bool, first: jax.Array) -> jax.Array:
    """`write_slots` for a part of each row: every position looks up which token of an image it is, if any."""
    place = first + jnp.arange(hidden.shape[1])
    for m in range(values.shape[1]):
        token = place - image_start[:, m, None]  # [B, T]
        inside = (image_start[:, m, None] != EMPTY_SLOT) & (token >= 0) & (token < values.shape[2])
        index = jnp.clip(token, 0, values.shape[2] - 1)[..., None]
        value = jnp.take_along_axis(values[:, m].astype(hidden.dtype), index, axis=1)
        hidden = jnp.where(inside[..., None], hidden + value if add else value, hidden)
    return hidden


def _write_slot(row: jax.Array, value: jax.Array, start: jax.Array, add: bool) -> jax.Array:
    filled = start != EMPTY_SLOT
    start = jnp.maximum(start, 0)
    old = jax.lax.dynamic_slice_in_dim(row, start, value.shape[0], 0)
    new = old + value if add else value
    return jax.lax.dynamic_update_slice_in_dim(row, jnp.where(filled, new, old), start, 0)


def read_slots(hidden: jax.Array, image_start: jax.Array, length: int) -> jax.Array:
    """[B, T, D] -> [B, M, N, D], N = length: the runs that `write_slots` writes to; zeros for empty slots."""
    read = jax.vmap(jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, length, 0), (None, 0)))
    runs = read(hidden, jnp.maximum(image_start, 0))
    return jnp.where((image_start != EMPTY_SLOT)[..., None, None], runs, 0)


def belonging(segments: jax.Array, image_start: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Which images belong to each position's text, and which of these it stands behind: two bool[B, T, M].

    Args:
      segments: int32[B, T], text that each position belongs to, 0 for padding.
      image_start: int32[B, M]; length: positions of an image.
    """
    theirs = jnp.take_along_axis(segments, jnp.maximum(image_start, 0), axis=1, mode="clip")[:, None, :]
    own = (image_start != EMPTY_SLOT)[:, None, :] & (segments[:, :, None] == theirs) & (segments > 0)[:, :, None]
    place = jnp.arange(segments.shape[1])[:, None]
    return own, own & (place >= image_start[:, None, :] + length)
