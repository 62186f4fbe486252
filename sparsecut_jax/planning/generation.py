"""The matmuls of generation: of reading prompts, and of one more token after them. By shapes alone, as in work.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsecut_jax.inference.decoding import encode_images, read_prompts
from sparsecut_jax.models.llm import Cache
from sparsecut_jax.models.parameters import unflatten
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.planning.jaxprs import Product, traced
from sparsecut_jax.planning.work import Shapes, products
from sparsecut_jax.settings import Config
from sparsecut_jax.types import Batch


def of_prefill(cfg: Config, name: str, shapes: Shapes, rows: int, length: int) -> list[Product]:
    """The matmuls of encoding the images of `rows` whole prompts of `length` positions, and of reading these.

    Logits are those of one position each. The other arguments are those of `work.products`.
    """
    whole = products(cfg, name, shapes, rows, length, again=False)
    last = lambda p: dataclasses.replace(p, flops=p.flops / length, moved=p.moved / length, outputs=p.outputs / length)
    return [last(p) if p.part == "loss" else p for p in whole]


def of_decode(model: SparseCut, shapes: Shapes, cache: Cache) -> list[Product]:
    """The matmuls of one more token in every row of a cache, all of which is read."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    rows, seen = cache.positions.shape

    def decode(
        moving: dict, frozen: dict, cache: Cache, token: jax.Array, visible: jax.Array
    ) -> tuple[jax.Array, Cache]:
        return model.apply({"params": unflatten(frozen)}, token, token, visible, cache, method="decode")

    params = {path: of(model.dtype, *shape) for path, shape in shapes.items()}
    return traced(decode, {}, params, cache, of(jnp.int32, rows), of(bool, rows, seen))


def cache_of(model: SparseCut, params: Any, prompts: Batch, new: int) -> Cache:
    """The shapes of the cache in which `prompts`, as long as their batch, are continued by `new` tokens."""

    def prefill(params: Any, row: Batch) -> Cache:
        params = jax.tree.map(lambda x: x.astype(model.dtype), params)
        encoded = encode_images(model, params, row.views, row.extras.get("question"))
        length = np.full(len(row.tokens), row.tokens.shape[1], np.int32)
        return read_prompts(model, params, row.tokens, length, row.image_start, encoded, new)[1]

    return jax.eval_shape(prefill, params, prompts)
