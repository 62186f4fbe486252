"""`llm_kv`: text attends to the sources inside the self-attention of a layer, through the layer's own key and value matrices.

    out = self_attention(x) + gate * softmax(q k^T / sqrt(H)) v        before the output matrix

q are the layer's rotated queries, k and v the layer's keys of its first source and values of its second, not rotated. The
softmax is one of its own over all images that a position sees; a position that sees none gets nothing. The gate, a scalar
of each layer that has sources, is zero before the first step, so in the first step the gates get a gradient and the sources
none. It acts on generated tokens too: k and v are computed once per image and kept beside the KV cache, in the dtype of the
computation.

Scores are computed only in layers that have sources; keys and values of the sources in all layers, and discarded in the
others, since adapters of k and v may draw dropout, which a branch cannot. That costs 4 M Sr D G H FLOPs a row and layer in
the forward pass, for M images of Sr tokens and G KV heads of width H: 4 % of a layer of 7B (D = G H = 4096) for a picture of
576 tokens in 2,048 positions. With all of it in the branch, a training step with 2 of 8 layers (D = 256, 144 tokens in 512
positions) took 0.90 of the CPU time of one with all of it in every layer, 0.97 without remat.

Source: LayAlign (arXiv 2502.11405), without tanh, with a mask that the original lacks.
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
from sparsecut_jax.models.layers import weight, zeros
from sparsecut_jax.settings import LLMConfig, setting

in_decode = True


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which positions attend to an image."""

    rows: Literal["after", "all"] = setting(
        "after", "Positions that attend to an image: those of its text behind it (after), or all of its text."
    )


def weights(module: nn.Module, sites: int, llm: LLMConfig) -> dict[str, jax.Array]:
    return {"gate": weight(module, "gate", (sites,), ("sites",), zeros)}


def memory(settings: Settings, keys: Callable, values: Callable, here: Here) -> dict[str, jax.Array]:
    """Keys and values of all tokens of the row's images, [B, M * Sr, G, H] each."""
    tokens = lambda source: source.reshape(source.shape[0], -1, source.shape[-1])
    return {"k": keys(tokens(here.source(0))), "v": values(tokens(here.source(1)))}


def attend(settings: Settings, q: jax.Array, here: Here) -> jax.Array:
    kept = here.memory
    sees = here.own if settings.rows == "all" else here.after  # [B, T, M]
    each = kept["k"].shape[1] // sees.shape[-1]
    out = attention(q, kept["k"], kept["v"], jnp.repeat(sees, each, axis=-1))
    gate = here.weights["gate"].astype(q.dtype)
    return jnp.where(sees.any(-1)[..., None, None], gate * out, 0)
