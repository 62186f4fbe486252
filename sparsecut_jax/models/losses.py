"""Next-token cross-entropy over the target tokens of a batch.

Axes beside those of types.py: g, the data-parallel devices; W, the vocabulary, whose matrix [D, W] is called `words`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsecut_jax.runtime.sharding import constrain, constrain_weight, data_parallel, ways
from sparsecut_jax.types import Batch

BLOCK = 4096  # vocabulary entries whose part of the head's gradient is computed at once


def cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p over the tokens with loss_mask 1, each predicted from the position before it, and their count.

    Returns sums rather than means, so that micro-batches and devices add up to the mean over the whole batch.

    Args:
      logits: float32[B, T, W].

    Returns:
      (sum, count), both float32[].
    """
    targets, mask = _shifted(batch)
    return _nll(logits, targets, mask), jnp.sum(mask.astype(jnp.float32))


def chunked_cross_entropy(hidden: jax.Array, words: jax.Array, batch: Batch, chunk: int) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` of the logits hidden @ words, computed for `chunk` positions of each row at a time.

    Args:
      hidden: [B, T, D]; words: [D, W]; both in the compute dtype.
      batch: rows, with the same B and T.
      chunk: positions per chunk, more than 0.

    Returns:
      (sum, count), both float32[].
    """
    targets, mask = _shifted(batch)
    b, t = targets.shape
    g = data_parallel()
    by_device = lambda x: x.reshape(g, b // g, *x.shape[1:])
    total = _summed(by_device(hidden), words, by_device(targets), by_device(mask), min(chunk, t))
    return total, jnp.sum(mask.astype(jnp.float32))


def right_answers(hidden: jax.Array, words: jax.Array, batch: Batch, chunk: int) -> tuple[jax.Array, jax.Array]:
    """How many answers of a batch are right, and how many there are; both float32[].

    An answer is a run of target tokens. It is right if each is the most likely word, given the tokens before it: then
    greedy decoding writes it too. Arguments: see `chunked_cross_entropy`.
    """
    targets, mask = _shifted(batch)
    b, t = targets.shape
    g = data_parallel()
    by_device = lambda x: x.reshape(g, b // g, *x.shape[1:])
    words = _copies(words, g)
    missed = lambda part: (_logits(part[0], words).argmax(-1) != part[1]) & (part[2] > 0)
    wrong = jax.lax.map(missed, _chunks(min(chunk, t), *map(by_device, (hidden, targets, mask))))
    wrong = jnp.moveaxis(wrong, 0, 2).reshape(b, -1)[:, :t]
    starts = (mask > 0) & (jnp.pad(mask, ((0, 0), (1, 0)))[:, :t] == 0)
    number = jnp.cumsum(starts, axis=1)  # of the answer that a token belongs to, from 1
    missed = jnp.zeros((b, t + 1), bool).at[jnp.arange(b)[:, None], number].max(wrong)
    count = starts.sum(dtype=jnp.float32)
    return count - missed.sum(dtype=jnp.float32), count


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
@jax.named_scope("loss")
def _summed(hidden: jax.Array, words: jax.Array, targets: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """Sum of -log p, float32[].

    Args:
      hidden: [g, B, T, D], the rows of g devices; words: [D, W].
      targets, mask: [g, B, T], the token that each position has to predict, and whether it counts.
      size: positions per chunk.
    """
    words = _copies(words, hidden.shape[0])
    add = lambda total, part, at: total + _nll(_logits(part[0], words), *part[1:])
    return _over_supervised(add, jnp.zeros((), jnp.float32), _chunks(size, hidden, targets, mask))


@jax.named_scope("loss")
def _with_gradients(hidden: Any, words: Any, targets: Any, mask: Any, size: int):
    """The sum and its gradients with respect to hidden and words, computed while the logits of a chunk exist.

    The arguments are jax.custom_derivatives.CustomVJPPrimal: a head that is not trained gets no gradient.
    """
    trained = words.perturbed
    hidden, words, targets, mask = (argument.value for argument in (hidden, words, targets, mask))
    copies = _copies(words, targets.shape[0])
    in_blocks = ways("embed") > 1 and ways("act_vocab") == 1

    def add(carry: tuple, part: tuple, at: jax.Array) -> tuple:
        (total, by_words, chunks), (hidden, targets, mask) = carry, part
        logits = _logits(hidden, copies)
        log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        by_logits = _by_logits(logits, log_sum, targets, mask).astype(words.dtype)
        if by_words is not None:
            by_words += jnp.einsum("gBTD,gBTW->gDW", hidden, by_logits)
        by_hidden = jnp.einsum("gBTW,gDW->gBTD", by_logits, copies)
        chunks = [
            jax.lax.dynamic_update_index_in_dim(x, new, at, 0)
            for x, new in zip(chunks, (by_hidden, log_sum), strict=True)
        ]
        return total + _nll(logits, targets, mask), by_words, chunks

    parts = _chunks(size, hidden, targets, mask)
    chunks = [jnp.zeros_like(parts[0]), jnp.zeros((*parts[1].shape, 1), jnp.float32)]
    carry = (jnp.zeros((), jnp.float32), jnp.zeros_like(copies) if trained and not in_blocks else None, chunks)
    total, by_words, chunks = _over_supervised(add, carry, parts)
    whole = lambda x: jnp.moveaxis(x, 0, 2).reshape(*targets.shape[:2], -1, x.shape[-1])[:, :, : targets.shape[2]]
    by_hidden, log_sum = map(whole, chunks)
    if by_words is not None:
        by_words = constrain_weight(by_words.sum(0), "embed", "vocab")
    elif trained:
        by_words = _gradient_in_blocks(hidden, copies, log_sum, targets, mask, size)
        # Otherwise XLA would compute it after the whole backward pass and keep the gathered head until then.
        by_hidden, by_words = jax.lax.optimization_barrier((by_hidden, by_words))
    return total, (by_hidden, by_words)


def _gradient_in_blocks(
    hidden: jax.Array, copies: jax.Array, log_sum: jax.Array, targets: jax.Array, mask: jax.Array, size: int
) -> jax.Array:
    """Gradient with respect to words, [D, W], for BLOCK entries of W at a time, from recomputed logits.

    Used where the matrix is sharded: otherwise each device would hold several copies of the whole gradient and keep only
    its shard of their sum.
    """
    _, d, w = copies.shape
    width = next(n for n in range(min(BLOCK, w), 0, -1) if w % n == 0)
    parts = _chunks(min(targets.shape[2], size * w // width), hidden, log_sum, targets, mask)

    def block(first: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(copies, first, width, axis=2)

        def add(by_words: jax.Array, part: tuple) -> tuple:
            hidden, log_sum, targets, mask = part
            by_logits = _by_logits(_logits(hidden, some), log_sum, targets - first, mask)
            return by_words + jnp.einsum("gBTD,gBTW->gDW", hidden, by_logits.astype(some.dtype)), None

        by_words = jax.lax.scan(add, jnp.zeros_like(some), parts)[0]
        return constrain_weight(by_words.sum(0), "embed", "vocab")

    return jax.lax.map(block, jnp.arange(0, w, width)).swapaxes(0, 1).reshape(d, w)


@jax.named_scope("loss")
def _scaled(size: int, gradients: tuple[jax.Array, jax.Array | None], by: jax.Array) -> tuple:
    return *(g if g is None else (by * g).astype(g.dtype) for g in gradients), None, None


_summed.defvjp(_with_gradients, _scaled, symbolic_zeros=True)


def _copies(words: jax.Array, g: int) -> jax.Array:
    """[D, W] -> [g, D, W]: one copy of the matrix per device, gathered once rather than once per chunk."""
    return constrain(jnp.broadcast_to(words, (g, *words.shape)), "batch", None, "act_vocab")


def _chunks(size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[g, B, T, ...] -> [chunks, g, B, size, ...] each, padded with zeros (masked positions)."""

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % size)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    return tuple(map(cut, arrays))


def _over_supervised(add: Callable, carry: Any, parts: tuple[jax.Array, ...]) -> Any:
    """Folds add(carry, part, number) over the chunks that have a target token: most of a row is image and question.

    parts: arrays [chunks, ...], the last of them the mask.
    """
    some = jnp.any(parts[-1] > 0, axis=tuple(range(1, parts[-1].ndim)))
    order = jnp.argsort(~some)

    def step(i: jax.Array, carry: Any) -> Any:
        part = tuple(jax.lax.dynamic_index_in_dim(x, order[i], keepdims=False) for x in parts)
        return add(carry, part, order[i])

    return jax.lax.fori_loop(0, jnp.sum(some), step, carry)


def _logits(hidden: jax.Array, words: jax.Array) -> jax.Array:
    """[g, B, T, D], [g, D, W] -> float32[g, B, T, W]."""
    logits = jnp.einsum("gBTD,gDW->gBTW", hidden, words, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", None, "length", "act_vocab")


def _by_logits(logits: jax.Array, log_sum: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Gradient of -log p with respect to the logits: p minus the one-hot target, 0 where the mask is 0."""
    return jnp.where(mask[..., None] > 0, jnp.exp(logits - log_sum) - _is_word(targets, logits.shape), 0)


def _shifted(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The token that each position predicts, int32[B, T], and whether it counts, uint8[B, T]; the last predicts none."""
    next_of = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    return next_of(batch.tokens), next_of(batch.loss_mask)


def _nll(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """float32[..., W], int32[...], uint8[...] -> sum of -log p, float32[]."""
    # A masked sum instead of take_along_axis, whose gather over a sharded vocabulary would all-gather the logits.
    right = jnp.sum(jnp.where(_is_word(targets, logits.shape), logits, 0), axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - right
    # where, not multiplication: the loss of a masked position may be nan
    return jnp.sum(jnp.where(mask > 0, nll, 0))


def _is_word(targets: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """int32[...] -> bool[..., W], True at the target's id. shape: that of the result."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == targets[..., None]
