"""LoRA adapters for linear layers of the LLM: y += alpha / rank * (dropout(x) @ a) @ b.

Source: LoRA (arXiv 2106.09685); initialised and scaled as in PEFT. An adapter adds two parameters to the module that owns
the linear layer: `q_lora_a` [*inputs, rank] and `q_lora_b` [rank, *outputs] next to `q`, `gate_lora_a` next to
`gate/kernel`. Stacked layers have stacked adapters.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.layers import weight, zeros
from sparsecut_jax.runtime.sharding import constrain
from sparsecut_jax.settings import LoraConfig

Matrices = tuple[jax.Array, jax.Array]


def is_adapter(path: str) -> bool:
    """Whether the parameter at `path` belongs to an adapter."""
    return path.endswith(("_lora_a", "_lora_b"))


def matrices(
    module: nn.Module, lora: LoraConfig, path: str, shape: tuple, axes: tuple, inputs: int = 1
) -> Matrices | None:
    """Parameters a and b of the adapter for the linear layer at `path`; None if the config has none there.

    shape, axes: shape and logical axes of the layer's kernel, whose first `inputs` axes are contracted. b starts at zero.
    """
    if not lora.rank or not any(re.fullmatch(pattern, path) for pattern in lora.targets):
        return None
    name, bound = path.rsplit("/", 1)[1], math.prod(shape[:inputs]) ** -0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    rank = lambda others: "rank" if "embed" in others else "rank_alone"
    ins, outs = axes[:inputs], axes[inputs:]
    a = weight(module, f"{name}_lora_a", (*shape[:inputs], lora.rank), (*ins, rank(ins)), uniform)
    b = weight(module, f"{name}_lora_b", (lora.rank, *shape[inputs:]), (rank(outs), *outs), zeros)
    return a, b


def narrow(module: nn.Module, lora: LoraConfig, x: jax.Array, a: jax.Array) -> jax.Array:
    """alpha / rank * dropout(x) @ a: [..., rank] in the dtype of x [..., *inputs]. The first axis is the batch.

    Dropout is active only if the module is given a "dropout" rng, as in training.
    """
    if lora.dropout and module.has_rng("dropout"):
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1 - lora.dropout), 0)
    y = jnp.tensordot(x, a.astype(x.dtype), a.ndim - 1) * (lora.alpha / lora.rank)
    return constrain(y, "batch", *[None] * (y.ndim - 1))


def add_adapter(module: nn.Module, lora: LoraConfig, x: jax.Array, y: jax.Array, adapter: Matrices | None) -> jax.Array:
    """y, the output of a linear layer for input x, plus the output of its adapter, if there is one (`matrices`)."""
    if adapter is None:
        return y
    a, b = adapter
    return y + jnp.tensordot(narrow(module, lora, x, a), b.astype(x.dtype), 1)


def merge(flat: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """{path: parameter} with every adapter merged into its linear layer, in that layer's dtype."""
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path in flat:
        if path.endswith("_lora_a"):
            base = path.removesuffix("_lora_a")
            a, b = flat[path], flat[f"{base}_lora_b"]
            base = base if base in merged else f"{base}/kernel"
            merged[base] = _merged(merged[base], a, b, lora.alpha / lora.rank, "/layers/" in base)
    return merged


@functools.partial(jax.jit, static_argnames="stacked")
def _merged(base: jax.Array, a: jax.Array, b: jax.Array, scale: float, stacked: bool) -> jax.Array:
    def one(parts: tuple[jax.Array, ...]) -> jax.Array:
        base, a, b = (x.astype(jnp.float32) for x in parts)
        return (base + scale * jnp.tensordot(a, b, 1, precision="highest")).astype(parts[0].dtype)

    # Layer by layer: the float32 sum of a whole stack would be twice as large as its bfloat16 result.
    return jax.lax.map(one, (base, a, b)) if stacked else one((base, a, b))
