"""Parts that the tower, the fusion and the LLM share: weights with named axes, norms, activations, rotary positions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.attention import Sight, attention
from sparsecut_jax.runtime.sharding import constrain, constrain_weight
from sparsecut_jax.settings import RopeConfig

normal = nn.initializers.normal
zeros = nn.initializers.zeros
ones = nn.initializers.ones


def fan_in(inputs: int) -> Callable:
    """Normal initialiser with variance 1 / inputs."""
    return nn.initializers.normal(inputs**-0.5)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


def weight(
    module: nn.Module, name: str, shape: tuple, axes: tuple, init: Callable, dtype: jnp.dtype | None = None
) -> jax.Array:
    """A parameter whose axes have logical names (`sharding.RULES`), made in float32; cast to `dtype` for its use."""
    value = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value if dtype is None else constrain_weight(value.astype(dtype), *axes)


class Linear(nn.Module):
    """y = x @ kernel (+ bias), in the dtype of x. `axes` are the logical names of kernel[in, out]."""

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = weight(self, "kernel", (x.shape[-1], self.features), self.axes, fan_in(x.shape[-1]), x.dtype)
        y = jnp.einsum("...i,io->...o", x, kernel)
        if self.use_bias:
            y += weight(self, "bias", (self.features,), self.axes[1:], zeros, x.dtype)
        return y


class LayerNorm(nn.Module):
    """LayerNorm computed in float32, returned in the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = weight(self, "scale", (x.shape[-1],), ("norm",), ones)
        bias = weight(self, "bias", (x.shape[-1],), ("norm",), zeros)
        y = x.astype(jnp.float32)
        y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm computed in float32, returned in the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = weight(self, "scale", (x.shape[-1],), ("norm",), ones)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class MultiHeadAttention(nn.Module):
    """Attention with biases on q, k, v and out (CLIP's, and PyTorch's nn.MultiheadAttention).

    x: [B, T, C] queries; memory: [B, S, C] keys and values (x itself when left out); sight: see `attention` -> [B, T, C].
    """

    heads: int
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None = None, sight: Sight = None) -> jax.Array:
        memory = x if memory is None else memory
        width = x.shape[-1]
        shape = (width, self.heads, width // self.heads)

        def project(name: str, inputs: jax.Array) -> jax.Array:
            kernel = weight(self, f"{name}_kernel", shape, ("embed", "heads", "head_dim"), fan_in(width), x.dtype)
            bias = weight(self, f"{name}_bias", shape[1:], ("heads", "head_dim"), zeros, x.dtype)
            y = jnp.einsum("BTC,CQH->BTQH", inputs, kernel) + bias
            return constrain(y, "batch", "length", "act_heads", None)

        out = attention(project("q", x), project("k", memory), project("v", memory), sight, backend=self.backend)
        shape, axes = (self.heads, width // self.heads, width), ("heads", "head_dim", "embed")
        kernel = weight(self, "out_kernel", shape, axes, fan_in(width), x.dtype)
        return jnp.einsum("BTQH,QHC->BTC", out, kernel) + weight(self, "out_bias", (width,), ("norm",), zeros, x.dtype)


def norm_ratio(added: jax.Array, to: jax.Array) -> jax.Array:
    """float32[], without gradient: L2 norm of `added` over that of `to`; 0 if that is 0, as where a way leaves rows empty."""
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))))
    there = norm(to)
    return jnp.where(there > 0, norm(added) / jnp.maximum(there, 1e-30), 0.0)


def rotary_table(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    rope: RopeConfig = RopeConfig(),
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32[B, T, 1, head_dim / 2], of int32 positions[B, T] (RoFormer, arXiv 2104.09864).

    Scaled as Hugging Face's ROPE_INIT_FUNCTIONS do: linear (arXiv 2306.15595), llama3 (Llama 3.1), longrope
    (arXiv 2402.13753).

    Args:
      lengths: int32[B, 1] or [B, T], the length of the text that each position belongs to. Only longrope reads it: texts
        longer than `rope.original_length` get the long factors at all their positions, others the short ones.
    """
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "linear":
        frequency /= rope.factor
    elif rope.kind == "llama3":
        # By the rotations within the original length: few -> divided, many -> kept, between -> blended.
        rotations = rope.original_length * frequency / (2 * jnp.pi)
        share = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        share = jnp.clip(share, 0, 1)
        frequency *= share + (1 - share) / rope.factor
    elif rope.kind == "longrope":
        short, long = jnp.array(rope.short_factor, jnp.float32), jnp.array(rope.long_factor, jnp.float32)
        is_long = (lengths > rope.original_length)[..., None, None]
        frequency = frequency / jnp.where(is_long, long, short)  # [B, 1 or T, 1, head_dim / 2]
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x[B, T, Q, H] in Hugging Face's layout: element i is paired with i + H/2."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
