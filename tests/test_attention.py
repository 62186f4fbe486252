"""Attention against NumPy in float64, and its backends against the plain one: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from sparsecut_jax.models import attention as attention_lib
from sparsecut_jax.models.attention import Packed, attention, segment_runs
from sparsecut_jax.runtime import sharding


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=1e-5, atol=atol)


# --- the plain one ---


MASK = np.array([  # T = 4 queries, S = 5 keys
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 1, 1, 0, 1],
    [1, 1, 1, 1, 1],
])  # fmt: skip


def test_lengths_of_packed_texts():
    """By segment; the branches of one share the length of the longest; padding has that of the first segment."""
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 3, 3, 3, 3, 3, 3]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 3, 4, 2]], np.int32)
    lengths = Packed(segments, None, positions, 3).lengths()
    assert lengths.tolist() == [[3, 3, 3, 4, 4, 4, 4, 3], [1, 1, 5, 5, 5, 5, 5, 5]]


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(groups, masked):
    """6 query heads over 6, 3, 2 or 1 KV heads; rows of the batch have masks of their own."""
    q, k, v = normal(2, 4, 6, 8), normal(2, 5, groups, 8, seed=1), normal(2, 5, groups, 8, seed=2)
    mask = np.stack([MASK, MASK[::-1]]).astype(bool) if masked else None
    out = attention(q, k, v, mask)
    for b in range(2):
        close(
            out[b], reference.attend(*(x[b].astype(np.float64) for x in (q, k, v)), None if mask is None else mask[b])
        )


def test_attention_of_large_scores():
    """The softmax does not overflow."""
    q, k, v = 100 * normal(1, 3, 1, 8), 100 * normal(1, 3, 1, 8, seed=1), normal(1, 3, 1, 8, seed=2)
    close(attention(q, k, v)[0], reference.attend(*(x[0].astype(np.float64) for x in (q, k, v))))


def test_attention_of_a_position_that_sees_nothing():
    """The mean of v, no NaN."""
    v = normal(1, 5, 2, 8)
    out = attention(normal(1, 3, 4, 8), normal(1, 5, 2, 8), v, np.zeros((1, 3, 5), bool))
    close(out[0, 1], np.repeat(v[0].mean(0), 2, axis=0))


def test_attention_in_bfloat16():
    """Scores and softmax in float32, result in bfloat16."""
    q, k, v = (jnp.asarray(normal(1, 64, 2, 16, seed=i), jnp.bfloat16) for i in range(3))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    close(out[0], reference.attend(*(np.asarray(x[0], np.float64) for x in (q, k, v))), atol=0.01)


# --- who sees whom in packed sequences ---


def test_packed_mask():
    """A prefix, two branches, a second segment, padding; rows see columns."""
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    branches = np.array([[0, 0, 1, 1, 2, 0, 1, 0]])
    positions = np.array([[0, 1, 2, 3, 2, 0, 1, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert Packed(segments, branches, positions, most=2).mask()[0].astype(int).tolist() == expected
    expected[3][:2] = [0, 0]  # with a window of 2, position 3 sees itself and the one before
    expected[2][0] = expected[4][0] = 0  # the second branch begins at position 2 again
    assert Packed(segments, branches, positions, most=2).mask(2)[0].astype(int).tolist() == expected
    plain = Packed(segments, None, positions, most=2).mask()[0].astype(int)
    assert plain[4].tolist() == [1, 1, 1, 1, 1, 0, 0, 0] and plain[6].tolist() == [0, 0, 0, 0, 0, 1, 1, 0]


def test_segment_runs():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8])
    starts, lengths = segment_runs(segments, 4)
    assert starts.tolist() == [[0, 3, 4, -1], [0, -1, -1, -1], [-1, -1, -1, -1]]
    assert lengths.tolist() == [[3, 1, 2, -1], [2, -1, -1, -1], [-1, -1, -1, -1]]


# --- backends ---


def packed(b, t, branches=False, seed=3):
    """Segments of drawn lengths with some padding behind; with branches, each segment's second half is two of them."""
    rng = np.random.default_rng(seed)
    columns = np.zeros((3, b, t), np.int32)
    for row in range(b):
        at, segment = 0, 0
        while at < t * 0.8:
            n = min(int(rng.integers(2, t // 3)), t - at)
            segment += 1
            columns[0, row, at : at + n] = segment
            columns[2, row, at : at + n] = np.arange(n)
            if branches:
                columns[1, row, at + n // 2 : at + n] = 1
                columns[1, row, at + 3 * n // 4 : at + n] = 2
            at += n
    return Packed(columns[0], columns[1] if branches else None, columns[2], most=t)


def values_and_gradients(q, k, v, sight, window, backend):
    """Output at real positions, and the gradients of a drawn weighting of them."""
    real = None if sight is None else (np.asarray(sight.segments) > 0)[..., None, None]
    weights = normal(*q.shape, seed=9) * (1 if real is None else real)

    def weighted(q, k, v):
        out = attention(q, k, v, sight, window, backend)
        return jnp.sum(out * weights), out if real is None else jnp.where(real, out, 0)

    (_, out), grads = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


def same(t, heads, groups, head_dim, sight, backend, window=None, atol=2e-5):
    q = normal(2, t, heads, head_dim)
    k, v = (normal(2, t, groups, head_dim, seed=i) for i in (1, 2))
    plain = values_and_gradients(q, k, v, sight, window, "xla")
    for name, got, expected in zip("ovqk", values_and_gradients(q, k, v, sight, window, backend), plain, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(("tile", "together"), [(256, 2**18), (256, 0), (32, 0)])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_tiled(monkeypatch, tile, together, branches, window):
    """All heads in one tile, a tile a head, and five blocks of queries of one head, the last of them smaller."""
    monkeypatch.setattr(attention_lib, "TILE", tile)
    monkeypatch.setattr(attention_lib, "TOGETHER", together)
    same(72, 4, 2, 8, packed(2, 72, branches), "tiled", window)


def test_tiled_without_a_mask(monkeypatch):
    """The tower's; and queries of another length than the keys, in the fusion."""
    monkeypatch.setattr(attention_lib, "TILE", 16)
    monkeypatch.setattr(attention_lib, "TOGETHER", 0)
    same(50, 3, 3, 8, None, "tiled")
    q, k, v = normal(2, 20, 4, 8), normal(2, 50, 4, 8, seed=1), normal(2, 50, 4, 8, seed=2)
    close(attention(q, k, v, backend="tiled"), attention(q, k, v))


def test_tiled_keeps_no_scores():
    """Compiled for 1024 positions, forward and backward hold a fraction of the plain one's [B, Q, T, T] scores."""
    sight = packed(2, 1024)
    q, k, v = (jax.ShapeDtypeStruct((2, 1024, 4, 16), jnp.float32) for _ in range(3))

    def temp(backend):
        grads = jax.grad(lambda *x: attention(*x, sight, None, backend).sum(), (0, 1, 2))
        return jax.jit(grads).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    scores = 2 * 4 * 1024 * 1024 * 4
    assert temp("xla") > scores
    assert temp("tiled") < temp("xla") / 4


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel, run on the CPU by Pallas."""
    backends = {**attention_lib.BACKENDS, "splash": functools.partial(attention_lib._splash, interpret=True)}
    monkeypatch.setattr(attention_lib, "BACKENDS", backends)


@pytest.mark.parametrize("window", [None, 40])
def test_splash_packed(interpreted, window):
    """Two blocks of 128 positions, grouped KV heads."""
    same(256, 4, 2, 128, packed(2, 256), "splash", window, atol=1e-4)


def test_splash_pads_to_whole_blocks(interpreted):
    """The tower's 577 positions are no multiple of 128; what is filled up is seen by nobody."""
    same(150, 2, 2, 64, None, "splash", atol=1e-4)
    same(150, 2, 2, 64, packed(2, 150), "splash", atol=1e-4)


def test_splash_of_another_number_of_keys(interpreted):
    """The low-res view's tokens ask those of all crops (fusion "cross_attention")."""
    q, k, v = normal(2, 150, 2, 64), normal(2, 600, 2, 64, seed=1), normal(2, 600, 2, 64, seed=2)
    close(attention(q, k, v, backend="splash"), attention(q, k, v), atol=1e-4)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_fused_kernels_refuse_branches(backend):
    with pytest.raises(ValueError, match="cannot mask branches"):
        attention(*(normal(2, 72, 2, 8) for _ in range(3)), packed(2, 72, branches=True), None, backend)


def lowered_for_gpu(monkeypatch, sight, t=256):
    """StableHLO of cuDNN's attention and its gradient; no GPU is needed for that, only its version."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    x = jax.ShapeDtypeStruct((2, t, 4, 64), jnp.bfloat16)
    grads = jax.grad(lambda q, k, v: attention(q, k, v, sight, None, "cudnn").astype(jnp.float32).sum(), (0, 1, 2))
    return jax.jit(grads).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("most", [0, 1, 5])
def test_cudnn_is_asked_for_segments_without_a_mask(monkeypatch, most):
    """Everything seen, one segment a row, several: cuDNN's fused calls, no [T, T] array, and offsets for several."""
    sight = packed(2, 256) if most else None
    text = lowered_for_gpu(monkeypatch, sight and sight.replace(most=most))
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "256x256" not in text
    assert ("PADDING_CAUSAL" in text) == (most > 0)
    assert ("2x6xi32" in text) == (most == 5)


def test_cudnn_takes_a_tower_of_odd_length(monkeypatch):
    """SigLIP's 729 positions, trained: one is added, and by its lengths cuDNN does not see it."""
    text = lowered_for_gpu(monkeypatch, None, t=729)
    assert "__cudnn$fmhaSoftmaxBackward" in text and "2x730x4x64xbf16" in text and "PADDING" in text


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 2)], ids=str)
def test_tiled_on_meshes(sizes):
    """Each device works on its rows and heads, and nothing is gathered."""
    mesh = sharding.make_mesh(
        dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), jax.devices()[: int(np.prod(sizes))]
    )
    q, k, v = normal(8, 48, 4, 8), normal(8, 48, 2, 8, seed=1), normal(8, 48, 2, 8, seed=2)
    sight = packed(8, 48, branches=True)
    expected = attention(q, k, v, sight)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda q, k, v: attention(q, k, v, sight, None, "tiled"))
        pinned = lambda x: sharding.constrain(x, "batch", "length", "act_heads", None)
        placed = [jax.jit(pinned)(x) for x in (q, k, v)]
        compiled = run.lower(*placed).compile()
        close(compiled(*placed), expected)
    assert "all-gather" not in compiled.as_text()
