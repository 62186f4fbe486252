"""`cross`: a gated cross-attention layer and its MLP stand before each LLM layer that has sources.

    x = x + tanh(a) * attention(norm(x), sources)       a and f are scalars of each such layer,
    x = x + tanh(f) * mlp(norm(x))                      zero before the first step

Both branches act only on positions that see an image: those of its text behind it. Queries, keys, values and the gated MLP
have weights of their own, of the LLM's sizes; queries and keys are normalised per head and not rotated. Keys and values are
computed once per image and kept beside the KV cache, so generated tokens see the image too.

Source: Flamingo (arXiv 2204.14198); norms, grouped heads and gates as in transformers' `MllamaCrossAttentionDecoderLayer`.
The layers of a text checkpoint keep their numbers, since these stand between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.attention import attention
from sparsecut_jax.models.interfaces import Here
from sparsecut_jax.models.layers import ACTIVATIONS, fan_in, norm_ratio, ones, weight, zeros
from sparsecut_jax.runtime.sharding import constrain, constrain_weight, ways
from sparsecut_jax.settings import LLMConfig, setting
from sparsecut_jax.types import EMPTY_SLOT

in_decode = True
EPSILON = 1e-5
AXES = {
    "norm1": ("norm",), "norm2": ("norm",), "q_norm": ("head_dim",), "k_norm": ("head_dim",),
    "q": ("embed", "heads", "head_dim"), "k": ("embed", "heads", "head_dim"), "v": ("embed", "heads", "head_dim"),
    "out": ("heads", "head_dim", "embed"),
    "mlp_gate": ("embed", "mlp"), "mlp_up": ("embed", "mlp"), "mlp_down": ("mlp", "embed"),
    "gate_attention": (), "gate_mlp": (),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a position sees."""

    sees: Literal["all", "last"] = setting(
        "all", "Images that a position of their text sees: all before it, or the last one before it."
    )


def weights(module: nn.Module, sites: int, llm: LLMConfig) -> dict[str, jax.Array]:
    width, heads, groups, size, hidden = llm.width, llm.heads, llm.kv_heads, llm.head_dim, llm.mlp_dim
    shapes = {
        "norm1": (width,), "norm2": (width,), "q_norm": (size,), "k_norm": (size,),
        "q": (width, heads, size), "k": (width, groups, size), "v": (width, groups, size), "out": (heads, size, width),
        "mlp_gate": (width, hidden), "mlp_up": (width, hidden), "mlp_down": (hidden, width),
        "gate_attention": (), "gate_mlp": (),
    }  # fmt: skip
    inputs = {"out": heads * size, "mlp_down": hidden}

    def made(name: str) -> jax.Array:
        init = ones if "norm" in name else zeros if name.startswith("gate") else fan_in(inputs.get(name, width))
        return weight(module, name, (sites, *shapes[name]), ("sites", *_axes(name, llm.replicate_kv)), init)

    return {name: made(name) for name in shapes}


def _axes(name: str, replicate_kv: bool) -> tuple[str, ...]:
    return ("embed", "kv_heads", "head_dim") if replicate_kv and name in ("k", "v") else AXES[name]


def memory(settings: Settings, keys: Callable | None, values: Callable | None, here: Here) -> dict[str, jax.Array]:
    """Keys and values of all tokens of the row's images, [B, M * Sr, G, H] each; G = Q if tensor parallelism splits a group."""
    source = here.source(0)
    tokens = source.reshape(source.shape[0], -1, source.shape[-1])
    k, v = (jnp.einsum("BSD,DGH->BSGH", tokens, _cast(here, name, tokens)) for name in "kv")
    k = _normed(k, here.weights["k_norm"])
    heads, groups = here.weights["q"].shape[1], k.shape[2]
    if groups % ways("heads"):
        k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
    return {"k": constrain(k, "batch", None, "act_heads", None), "v": constrain(v, "batch", None, "act_heads", None)}


def before(settings: Settings, x: jax.Array, here: Here) -> tuple[jax.Array, jax.Array]:
    sees = here.after if settings.sees == "all" else _last(here.after, here.image_start)
    any_image = sees.any(-1)[..., None]
    gate = lambda name: jnp.tanh(here.weights[name]).astype(x.dtype)

    q = jnp.einsum("BTD,DQH->BTQH", _normed(x, here.weights["norm1"]), _cast(here, "q", x))
    q = constrain(_normed(q, here.weights["q_norm"]), "batch", "length", "act_heads", None)
    k, v = here.memory["k"], here.memory["v"]
    out = attention(q, k, v, jnp.repeat(sees, k.shape[1] // sees.shape[-1], axis=-1))
    y = jnp.einsum("BTQH,QHD->BTD", out, _cast(here, "out", x))
    new = constrain(x + jnp.where(any_image, gate("gate_attention") * y, 0), "batch", "length", "act_embed")

    y = _normed(new, here.weights["norm2"])
    hidden = ACTIVATIONS["silu"](y @ _cast(here, "mlp_gate", x)) * (y @ _cast(here, "mlp_up", x))
    y = constrain(hidden, "batch", "length", "act_mlp") @ _cast(here, "mlp_down", x)
    new = constrain(new + jnp.where(any_image, gate("gate_mlp") * y, 0), "batch", "length", "act_embed")
    return new, jnp.broadcast_to(norm_ratio(new - x, x), here.rows.shape)


def _last(after: jax.Array, image_start: jax.Array) -> jax.Array:
    """bool[B, T, M] -> the same with the last image alone."""
    starts = jnp.where(after, image_start[:, None, :], EMPTY_SLOT)
    return after & (starts == starts.max(-1, keepdims=True))


def _cast(here: Here, name: str, like: jax.Array) -> jax.Array:
    """A weight in the dtype of `like`."""
    kv = name in ("k", "v") and here.weights[name].shape[1] % ways("heads")
    return constrain_weight(here.weights[name].astype(like.dtype), *_axes(name, bool(kv)))


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return (y * scale).astype(x.dtype)
