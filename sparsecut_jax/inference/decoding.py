"""Generation, from prompts to ids, as one compiled function: prefill, then a loop that ends when all rows have ended."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsecut_jax.models.llm import Cache, empty_cache
from sparsecut_jax.models.sparsecut import Encoded, SparseCut
from sparsecut_jax.text.conversation import Example
from sparsecut_jax.types import EMPTY_SLOT


@functools.partial(jax.jit, static_argnames=("model",))
def encode_images(model: SparseCut, params: Any, views: jax.Array, question: jax.Array | None = None) -> Encoded:
    """uint8[B, M, V, S, S, 3] -> Encoded. question: int32[B, M, Tq], for ways of fusing that read it."""
    return model.apply({"params": params}, views, question, method="encode")


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "return_logits", "chunk"))
def generate(
    model: SparseCut,
    params: Any,
    tokens: jax.Array,
    length: jax.Array,
    image_start: jax.Array,
    encoded: Encoded,
    max_new_tokens: int,
    stop: jax.Array | int = -1,
    temperature: jax.Array | float = 0.0,
    key: jax.Array | None = None,
    return_logits: bool = False,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """Continues every row until an end token or `max_new_tokens`.

    The logits of a row depend only on its own prompt, images and tokens so far, not on other rows or `max_new_tokens`.

    With longrope the factors of the rotary frequencies change when a text outgrows `rope.original_length`. The logits of
    each token are those of one forward pass over the row so far, with the factors for its current length. A row is therefore
    recomputed once, when it reaches `original_length + 1` tokens, so that all its keys get the long factors. transformers
    does the same for Phi-3 (`prepare_inputs_for_generation` drops the cache there); vLLM decides once, by max_model_len.

    Args:
      tokens: int32[B, T], prompts padded on the right; length: int32[B], tokens of each.
      image_start: int32[B, M]; encoded: images, one row per prompt. a plain add acts on the prompt only.
      stop: int32[] or int32[E], ids that end a row, -1 for none; after the end, a row is filled with the first of them.
      temperature: 0 takes the most likely token; above 0, tokens are sampled with `key`.
      chunk: positions of the prompts that are read at a time; 0: all.

    Returns:
      int32[B, max_new_tokens], and float32[B, max_new_tokens, W] logits with `return_logits`, else None.
    """
    b, t = tokens.shape
    key = jax.random.key(0) if key is None else key
    stop = jnp.atleast_1d(jnp.asarray(stop, jnp.int32))
    rope = model.llm_config.rope
    may_outgrow = rope.kind == "longrope" and t + max_new_tokens > rope.original_length
    slots = jnp.arange(t + max_new_tokens)
    first, cache = read_prompts(model, params, tokens, length, image_start, encoded, max_new_tokens, chunk)

    def pick(logits: jax.Array, i: jax.Array) -> jax.Array:
        drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)

    def unfinished(carry):
        i, _, done, _, _, _ = carry
        return (i < max_new_tokens) & ~jnp.all(done)

    def step(carry):
        i, logits, done, out, cache, all_logits = carry
        token = jnp.where(done, stop[0], pick(logits, i))
        out = out.at[:, i].set(token)
        if return_logits:
            all_logits = all_logits.at[:, i].set(logits)
        done = done | jnp.isin(token, stop)
        # Prompts have different lengths: new tokens are stored after the longest one, but their rotary positions
        # follow on from their own prompt.
        visible = (slots < length[:, None]) | ((slots >= t) & (slots <= t + i))
        logits, cache = model.apply(
            {"params": params}, jnp.maximum(token, 0), length + i, visible, cache, method="decode"
        )
        if may_outgrow:
            outgrown = ~done & (length + i == rope.original_length)  # the new token is the first one beyond
            read = lambda: read_again(out, length + i + 1, t + i, visible, logits, cache, outgrown)
            logits, cache = jax.lax.cond(outgrown.any(), read, lambda: (logits, cache))
        return i + 1, logits, done, out, cache, all_logits

    def read_again(out, lengths, last, visible, logits, cache, rows):
        """Logits and cache, with `rows`, bool[B], recomputed from the prompts and `out`."""
        text = jnp.concatenate([tokens, jnp.maximum(out, 0)], 1)
        positions = jnp.where(slots < t, slots, length[:, None] + slots - t)
        inputs = (text, positions, visible, jnp.full(b, last), lengths, image_start, encoded)
        empty = cache.replace(length=jnp.zeros_like(cache.length))
        new_logits, new = model.apply({"params": params}, *inputs, empty, chunk, method="read")
        choose = lambda new, old: jnp.where(rows[:, None, None, None], new, old)
        cache = cache.replace(k=choose(new.k, cache.k), v=choose(new.v, cache.v))
        return jnp.where(rows[:, None], new_logits, logits), cache

    out = jnp.full((b, max_new_tokens), stop[0], jnp.int32)
    all_logits = jnp.zeros((b, max_new_tokens, first.shape[-1]), jnp.float32) if return_logits else None
    # A row without a prompt is padding: it has ended.
    carry = (jnp.int32(0), first, length == 0, out, cache, all_logits)
    carry = jax.lax.while_loop(unfinished, step, carry)
    return carry[3], carry[5]


def read_prompts(
    model: SparseCut,
    params: Any,
    tokens: jax.Array,
    length: jax.Array,
    image_start: jax.Array,
    encoded: Encoded,
    max_new_tokens: int,
    chunk: int = 0,
) -> tuple[jax.Array, Cache]:
    """float32[B, W] logits of the position after each prompt, and a cache with room for more tokens; see `generate`."""
    b, t = tokens.shape
    cache = empty_cache(model.llm_config, b, t + max_new_tokens, model.dtype)
    inputs = (tokens, length, image_start, encoded, cache, chunk)
    return model.apply({"params": params}, *inputs, method="prefill")


def pad_prompts(prompts: list[Example], rows: int, slots: int, multiple: int = 16) -> tuple[np.ndarray, ...]:
    """Prompts -> tokens int32[rows, T], length int32[rows], image_start int32[rows, slots]; spare rows are empty.

    T is the length of the longest prompt, rounded up to a multiple of `multiple` so that few shapes are compiled.
    """
    longest = max(len(p.tokens) for p in prompts)
    tokens = np.zeros((rows, -(-longest // multiple) * multiple), np.int32)
    length = np.zeros(rows, np.int32)
    image_start = np.full((rows, slots), EMPTY_SLOT, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt.tokens)] = prompt.tokens
        length[i] = len(prompt.tokens)
        image_start[i, : len(prompt.image_start)] = prompt.image_start
    return tokens, length, image_start


def until(ids: np.ndarray, stop: Sequence[int]) -> list[int]:
    """The ids before the first one in `stop`."""
    return list(itertools.takewhile(lambda i: i not in stop, map(int, ids)))
