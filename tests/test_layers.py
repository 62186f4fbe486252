"""The parts that tower, fusion and LLM share, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import reference
from sparsecut_jax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    RMSNorm,
    norm_ratio,
    rotary_table,
    rotate,
)
from sparsecut_jax.settings import RopeConfig
from tiny import params_of


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("same", [True, False])
def test_multi_head_attention(same):
    x, memory = normal(2, 3, 12), normal(2, 7, 12, seed=1)
    module = MultiHeadAttention(heads=3)
    inputs = (x,) if same else (x, memory)
    params = params_of(module, *inputs)
    out = module.apply({"params": params}, *inputs)
    for b in range(2):
        close(out[b], reference.biased_attention(reference.double(params), x[b], x[b] if same else memory[b]))


def test_rotary():
    x, positions = normal(2, 3, 4, 8), np.array([[0, 1, 2], [5, 900, 2047]], np.int32)
    out = rotate(x, rotary_table(positions, 8, 10000.0))
    for b in range(2):
        close(out[b], reference.rotary(x[b].astype(np.float64), positions[b], 10000.0), atol=2e-4)  # float32 angles
    close(out[0], reference.rotary(x[0].astype(np.float64), positions[0], 10000.0), atol=1e-6)


def test_rotary_literal():
    """Width 4, theta 100: pairs (0, 2) and (1, 3) turn by p and p / 10."""
    x = np.array([1.0, 0.0, 0.0, 2.0], np.float32).reshape(1, 1, 1, 4)
    out = rotate(x, rotary_table(np.array([[3]], np.int32), 4, 100.0))
    close(out.reshape(4), [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)], atol=1e-6)


def test_rotary_depends_on_distances_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    at = lambda x, p: rotate(x, rotary_table(np.array([[p]], np.int32), 8, 10000.0))
    close((at(q, 7) * at(k, 3)).sum(), (at(q, 14) * at(k, 10)).sum())


def test_longrope_takes_the_factors_of_each_text_by_its_own_length():
    """Width 4, theta 100, original length 8: frequencies 1, 1/10, divided by 2, 4 or by 5, 10; cos and sin times 3."""
    rope = RopeConfig("longrope", original_length=8, short_factor=(2, 4), long_factor=(5, 10), attention_factor=3)
    positions, lengths = np.array([[6, 7], [6, 7]], np.int32), np.array([[8], [9]])
    cos, sin = rotary_table(positions, 4, 100.0, rope, lengths)
    angles = np.array([[[3, 0.15], [3.5, 0.175]], [[1.2, 0.06], [1.4, 0.07]]])
    close(cos, 3 * np.cos(angles)[:, :, None], atol=1e-6)
    close(sin, 3 * np.sin(angles)[:, :, None], atol=1e-6)
    cos, _ = rotary_table(positions, 4, 100.0, rope, np.array([[8, 9], [9, 8]]))  # packed: each position its own
    close(cos, 3 * np.cos(np.where([[[0], [1]], [[1], [0]]], angles[1], angles[0]))[:, :, None], atol=1e-6)


def test_layer_norm():
    x = normal(3, 12) * 3 + 1
    params = params_of(LayerNorm(1e-5), x)
    close(LayerNorm(1e-5).apply({"params": params}, x), reference.layer_norm(params, x.astype(np.float64), 1e-5))


def test_rms_norm():
    x = normal(3, 12) * 3 + 1
    params = params_of(RMSNorm(1e-5), x)
    close(RMSNorm(1e-5).apply({"params": params}, x), reference.rms_norm(params, x.astype(np.float64), 1e-5))


@pytest.mark.parametrize("norm, expected", [(LayerNorm, reference.layer_norm), (RMSNorm, reference.rms_norm)])
def test_eps(norm, expected):
    """Inputs so small that eps decides."""
    x = normal(3, 12) * 1e-3
    params = params_of(norm(1e-5), x)
    close(norm(1e-5).apply({"params": params}, x), expected(params, x.astype(np.float64), 1e-5))
    assert np.abs(expected(params, x, 1e-6) - expected(params, x, 1e-5)).max() > 0.1


@pytest.mark.parametrize("norm, expected", [(LayerNorm, reference.layer_norm), (RMSNorm, reference.rms_norm)])
def test_norms_of_bfloat16_are_computed_in_float32(norm, expected):
    """Mean 100, spread 1: a sum of squares in bfloat16 would be off by far more than the result's rounding."""
    x = jnp.asarray(normal(4, 256) + 100, jnp.bfloat16)
    params = params_of(norm(1e-5), x)
    out = norm(1e-5).apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    exact = expected(reference.double(params), np.asarray(x, np.float64), 1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2.0**-8, atol=1e-3)  # half a unit of 8 bits


@pytest.mark.parametrize("use_bias", [True, False])
def test_linear(use_bias):
    x = normal(2, 3, 5)
    module = Linear(7, ("embed", "mlp"), use_bias=use_bias)
    params = params_of(module, x)
    assert {name: leaf.shape for name, leaf in params.items()} == {"kernel": (5, 7)} | (
        {"bias": (7,)} if use_bias else {}
    )
    close(module.apply({"params": params}, x), reference.linear(reference.double(params), x))
    assert module.apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_activations():
    x = np.linspace(-6, 6, 49)
    expected = {
        "gelu": reference.gelu(x),
        "gelu_tanh": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": x * reference.sigmoid(1.702 * x),
        "silu": x * reference.sigmoid(x),
    }
    assert set(ACTIVATIONS) == set(expected)
    for name, values in expected.items():
        close(ACTIVATIONS[name](x.astype(np.float32)), values, atol=1e-6)
    assert np.abs(expected["gelu"] - expected["gelu_tanh"]).max() > 1e-4  # the tolerance tells them apart


def test_norm_ratio():
    """0, not a huge number, where nothing was there."""
    assert norm_ratio(jnp.array([3.0, 4.0]), jnp.array([0.0, 10.0])) == 0.5
    assert norm_ratio(jnp.array([3.0, 4.0]), jnp.zeros(2)) == 0
