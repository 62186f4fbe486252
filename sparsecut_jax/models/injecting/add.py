"""`add`: hidden[image positions] += source. No gate and no weights, as in SparseCut (arXiv 2602.00505).

It acts on prompts alone: what it adds is in the KV cache afterwards. `position="post"` adds after the layer, as
Qwen3-VL's DeepStack does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsecut_jax.models.interfaces import Here
from sparsecut_jax.models.layers import norm_ratio
from sparsecut_jax.models.slots import read_slots, write_slots
from sparsecut_jax.types import EMPTY_SLOT

in_decode = False


def before(settings: None, x: jax.Array, here: Here) -> tuple[jax.Array, jax.Array | None]:
    return add(x, here) if here.position == "pre" else (x, None)


def after(settings: None, x: jax.Array, here: Here) -> tuple[jax.Array, jax.Array | None]:
    return add(x, here) if here.position == "post" else (x, None)


def add(hidden: jax.Array, here: Here) -> tuple[jax.Array, jax.Array]:
    """[B, T, D] with the layer's sources added at image positions, and their ratios float32[A] (0 where none is)."""
    if here.first is not None:
        for place in range(here.rows.shape[0]):
            hidden = write_slots(hidden, here.source(place), here.image_start, True, here.first)
        return hidden, jnp.zeros(here.rows.shape[0])
    if hidden.shape[1] < here.bank.shape[-2]:  # too short to contain an image
        return hidden, jnp.zeros(here.rows.shape[0])
    ratios = []
    filled = (here.image_start != EMPTY_SLOT)[..., None, None]
    for place in range(here.rows.shape[0]):
        source = here.source(place)
        stood = read_slots(jax.lax.stop_gradient(hidden), here.image_start, source.shape[-2])
        ratios.append(norm_ratio(jnp.where(filled, jax.lax.stop_gradient(source), 0), stood))
        hidden = write_slots(hidden, source, here.image_start, add=True)
    return hidden, jnp.stack(ratios)
