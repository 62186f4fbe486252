"""Softmax attention: one function, with a backend for each kind of device.

xla     plain matmuls with all scores at once; takes any mask
tiled   for CPUs: scores of a few heads and queries at a time, which stay in the cache
splash  for TPUs: JAX's Pallas kernel, which skips fully masked blocks
cudnn   for GPUs: cuDNN's fused kernel, with segment lengths instead of a mask

`sight` says which positions see which: None (every position sees all), a dense bool[B, T, S], or `Packed`. Training only
needs `Packed`, and only xla expands it to a [T, S] mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from sparsecut_jax.runtime.sharding import spec

TILE = 256  # queries per tile: enough for an efficient matmul, and the scores stay in a core's cache
TOGETHER = 2**18  # scores per matmul up to which several short heads are processed together
CHAINS = 4  # tiles per iteration of the loop over heads, independent so that they can run in parallel
LANES = 128  # lanes of a TPU's vector registers; splash's blocks are multiples of them
SPLASH_BLOCK = 512


@flax.struct.dataclass
class Packed:
    """Causal attention within segments (drawn in types.Batch).

    Attributes:
      segments: int32[B, T], segment ids; 0 is padding.
      branches: int32[B, T], or None if no segment has branches.
      positions: int32[B, T], rotary positions, in which windows are measured.
      most: upper bound on the segments per sequence.
    """

    segments: jax.Array
    branches: jax.Array | None
    positions: jax.Array
    most: int = flax.struct.field(pytree_node=False)

    def mask(self, window: jax.Array | int | None = None) -> jax.Array:
        """bool[B, T, T], True where a query (second axis) sees a key (third axis)."""
        rows = lambda x: None if x is None else (x, x)
        return _visible(rows(self.segments), rows(self.branches), rows(self.positions), 0, window)

    def lengths(self) -> jax.Array:
        """int32[B, T], length of the text at each position: one more than the last rotary position of its segment."""
        mine = self.segments[:, None, :] == jnp.arange(1, self.most + 1)[:, None]
        lengths = jnp.where(mine, self.positions[:, None, :] + 1, 0).max(-1)
        return jnp.take_along_axis(lengths, jnp.maximum(self.segments - 1, 0), axis=1)


Sight = jax.Array | Packed | None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sight: Sight = None,
    window: jax.Array | int | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Softmax attention with grouped KV heads, scores and softmax in float32.

    Args:
      q: [B, T, Q, H].
      k, v: [B, S, G, H]; head q attends with KV head q // (Q // G).
      sight: bool[B, T, S], True where a query sees a key; or Packed (S = T); None: all see all. The output of a query
        that sees no key is finite and meaningless.
      window: with Packed, the number of positions that a query sees, itself included; None: all.
      backend: one of BACKENDS. A dense mask always goes to xla.

    Returns:
      [B, T, Q, H] in the dtype of q.
    """
    if backend == "xla" or isinstance(sight, jax.Array):
        return _xla(q, k, v, sight.mask(window) if isinstance(sight, Packed) else sight)
    if backend != "tiled" and isinstance(sight, Packed) and sight.branches is not None:
        raise ValueError(f"attention backend {backend!r} cannot mask branches")  # backends.resolve prevents it
    return _on_shards(functools.partial(BACKENDS[backend], window=window), q, k, v, sight)


def _on_shards(kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array, sight: Packed | None) -> jax.Array:
    """Runs `kernel` separately on each device's rows and heads, without communication."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, sight)
    heads, rows = spec(("batch", "length", "act_heads", None)), spec(("batch", "length"))
    by_device = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return by_device(q, k, v, sight)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    b, t, heads, h = q.shape
    groups = k.shape[2]
    # The query heads of a group become extra rows of one matmul.
    q = (q * h**-0.5).reshape(b, t, groups, -1, h).transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, h)
    out = _softmax_product(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask if mask is None else mask[:, None])
    return out.reshape(b, groups, -1, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, h)


def _softmax_product(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[..., R * T, H], [..., S, H], [..., S, H], bool[..., T, S] -> [..., R * T, H]."""
    scores = jnp.einsum("...TH,...SH->...TS", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        by_head = scores.reshape(*scores.shape[:-2], -1, *mask.shape[-2:])
        mask = jnp.expand_dims(mask, -3)
        scores = jnp.where(mask, by_head, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    # Dividing by the sum after the second matmul, on [.., H] instead of [.., S], and merging the heads make this 1.2 to 2
    # times faster on CPU than the plain form.
    out = jnp.einsum("...TS,...SH->...TH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)


def _visible(segments: tuple, branches: tuple | None, positions: tuple, first: int, window) -> jax.Array:
    """bool[..., T, S], True where a query sees a key. Each tuple is (values of queries [..., T], of keys [..., S]).

    first: index of the first query among the keys.
    """
    q, k = segments
    causal = first + jnp.arange(q.shape[-1])[:, None] >= jnp.arange(k.shape[-1])
    seen = causal & (q[..., :, None] == k[..., None, :])
    if branches is not None:
        q, k = branches
        seen &= (k[..., None, :] == 0) | (q[..., :, None] == k[..., None, :])
    if window is not None:
        q, k = positions
        seen &= q[..., :, None] - k[..., None, :] < window
    return seen


def _tiled(q: jax.Array, k: jax.Array, v: jax.Array, sight: Packed | None, window=None) -> jax.Array:
    """Loops over rows and KV heads, and within them over blocks of queries; keys after a causal block are skipped."""
    b, t, heads, h = q.shape
    s, groups = k.shape[1:3]
    each = heads // groups
    by_head = lambda x: x.swapaxes(1, 2).reshape(b * groups, -1, h)
    q = (q * h**-0.5).reshape(b, t, groups, each, h).transpose(0, 2, 3, 1, 4).reshape(b * groups, each, t, h)
    rows = jax.tree.map(lambda x: jnp.repeat(x, groups, axis=0), sight)
    blocks = -(-each * t // TILE)
    size = -(-t // blocks)  # of equal size

    @functools.partial(jax.checkpoint, static_argnums=4)  # recomputes the scores for the gradient
    def block(q: jax.Array, k: jax.Array, v: jax.Array, pairs: tuple | None, first: int) -> jax.Array:
        mask = None if pairs is None else _visible(*pairs, first, window)
        return _softmax_product(q.reshape(-1, h), k, v, mask).reshape(q.shape)

    def one_head(q: jax.Array, k: jax.Array, v: jax.Array, rows: Packed | None) -> jax.Array:
        """[R, T, H], [S, H], [S, H], int32[T] each -> [R, T, H]."""
        outs = []
        for first in range(0, t, size):
            last = min(first + size, t)
            end = s if rows is None else last
            pair = lambda x, first=first, last=last: None if x is None else (x[first:last], x[:last])
            pairs = None if rows is None else (pair(rows.segments), pair(rows.branches), pair(rows.positions))
            outs.append(block(q[:, first:last], k[:end], v[:end], pairs, first))
        return jnp.concatenate(outs, axis=1)

    at_once = min(b * groups, TOGETHER // (each * t * s))
    inputs = (q, by_head(k), by_head(v), rows)
    if at_once > 1:
        out = jax.lax.map(lambda x: one_head(*x), inputs, batch_size=at_once)
    else:
        _, out = jax.lax.scan(lambda _, x: (None, one_head(*x)), None, inputs, unroll=-(-CHAINS // blocks))
    return out.reshape(b, groups, each, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, h)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, sight: Packed | None, window=None, interpret: bool = False):
    """jax.experimental.pallas.ops.tpu.splash_attention, with sequences padded to whole blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, t, heads, h = q.shape
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)] + [(0, 0)] * (x.ndim - 2))
    ids = [x if sight is None else sight.segments for x in (jnp.ones(x.shape[:2], jnp.int32) for x in (q, k))]
    q, k, v = (pad(x).swapaxes(1, 2) for x in (q * h**-0.5, k, v))
    shape = (q.shape[2], k.shape[2])
    if sight is None:
        mask = masks.FullMask(shape)
    elif window is None:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    longest = lambda n: max(m for m in range(LANES, min(SPLASH_BLOCK, n) + 1, LANES) if n % m == 0)
    rows, columns = map(longest, shape)
    blocks = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns, block_q_dkv=rows, block_kv_dkv=columns,
        block_kv_dkv_compute=columns, block_q_dq=rows, block_kv_dq=columns,
    )  # fmt: skip
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads), block_sizes=blocks, interpret=interpret
    )
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(*map(pad, ids)))
    return out.swapaxes(1, 2)[:, :t]


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, sight: Packed | None, window=None) -> jax.Array:
    """cuDNN's flash attention through JAX, with segments given by their starts and lengths."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn's own function does not take segments

    (b, t), s = q.shape[:2], k.shape[1]
    even = lambda x: jnp.pad(
        x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]
    )  # JAX requires even lengths for the gradient
    run = functools.partial(cudnn.dot_product_attention, *map(even, (q, k, v)), scale=q.shape[-1] ** -0.5)
    if sight is None and t % 2 == s % 2 == 0:
        return run(mask_type=cudnn.MaskType.NO_MASK)
    if sight is None:
        whole = dict(q_seqlen=jnp.full(b, t, jnp.int32), kv_seqlen=jnp.full(b, s, jnp.int32))
        return run(mask_type=cudnn.MaskType.PADDING, **whole)[:, :t]
    run = functools.partial(run, mask_type=cudnn.MaskType.PADDING_CAUSAL, sliding_window_length=window)
    starts, lengths = segment_runs(sight.segments, sight.most)
    if sight.most == 1:  # also runs on GPUs older than Hopper
        return run(q_seqlen=lengths[:, 0], kv_seqlen=lengths[:, 0])[:, :t]
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return run(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts)[:, :t]


def segment_runs(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """int32[B, T] -> starts and lengths of segments 1, 2, ..., int32[B, most] each, -1 where there is none."""
    number = jnp.arange(1, most + 1)
    mine = segments[:, None, :] == number[:, None]
    lengths = mine.sum(-1, dtype=jnp.int32)
    starts = jnp.argmax(mine, -1).astype(jnp.int32)
    return jnp.where(lengths > 0, starts, -1), jnp.where(lengths > 0, lengths, -1)


BACKENDS = {"tiled": _tiled, "splash": _splash, "cudnn": _cudnn}
