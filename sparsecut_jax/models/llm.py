"""Llama-style decoder whose layers take shortcuts from a bank of image features.

Source: Llama (arXiv 2302.13971), Hugging Face `LlamaForCausalLM`; grouped-query attention (arXiv
2305.13245). Mistral, Qwen2, Qwen3 and Phi-3 are the same decoder with other settings. Layers are scanned: parameters carry a leading layer axis, and an int per layer and source
says which row of the bank enters there. That costs one masked add a layer and compiles one layer only.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.layers import (
    ACTIVATIONS,
    Linear,
    RMSNorm,
    attention,
    fan_in,
    normal,
    rotary_table,
    rotate,
    weight,
    zeros,
)
from sparsecut_jax.models.shortcuts import Plan, inject
from sparsecut_jax.settings import LLMConfig
from sparsecut_jax.sharding import constrain

INTERMEDIATES = ("hidden", "shortcut_ratio")


@flax.struct.dataclass
class Cache:
    """Keys and values of generation: k, v [L, B, S, G, H]; positions, int32[B, S], the rotary position of each;
    `length`, int32[], how many are filled so far."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    length: jax.Array


@flax.struct.dataclass
class Context:
    """What every layer reads.

    table: rotary cos and sin of the T positions.
    mask: bool[B, T, S], S the positions of the cache, or T without one.
    distance: int32[B, T, S], how far back each of them lies; None where no layer has a window.
    bank: [R, B, M, N, D] or None; image_start: int32[B, M].
    start: int32[], where in the cache the T positions go.
    """

    table: tuple[jax.Array, jax.Array]
    mask: jax.Array
    distance: jax.Array | None = None
    bank: jax.Array | None = None
    image_start: jax.Array | None = None
    start: jax.Array | None = None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; reads and writes layer `index` of the cache if there is one."""

    config: LLMConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None, index: jax.Array):
        cfg = self.config

        def project(name: str, heads: int) -> jax.Array:
            shape = (cfg.width, heads, cfg.head_dim)
            kernel = weight(self, name, shape, ("embed", "heads", "head_dim"), fan_in(cfg.width))
            y = jnp.einsum("BTD,DQH->BTQH", x, kernel.astype(x.dtype))
            if cfg.qkv_bias:
                y += weight(self, f"{name}_bias", shape[1:], ("heads", "head_dim"), zeros).astype(x.dtype)
            return constrain(y, "batch", "length", "act_heads", None)

        q, k, v = project("q", cfg.heads), project("k", cfg.kv_heads), project("v", cfg.kv_heads)
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, name="k_norm")(k)
        q, k = rotate(q, context.table), rotate(k, context.table)
        if cache is not None:
            at = (index, 0, context.start, 0, 0)
            cache = cache.replace(
                k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), at),
                v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), at),
            )
            k, v = cache.k[index], cache.v[index]
        mask = context.mask
        if cfg.sliding_window:
            mask &= (context.distance < cfg.sliding_window) | (index < cfg.sliding_from)
        out = attention(q, k, v, mask)
        shape, inputs = (cfg.heads, cfg.head_dim, cfg.width), cfg.heads * cfg.head_dim
        kernel = weight(self, "out", shape, ("heads", "head_dim", "embed"), fan_in(inputs))
        return jnp.einsum("BTQH,QHD->BTD", out, kernel.astype(x.dtype)), cache


class Mlp(nn.Module):
    """Gated MLP: down(activation(gate(x)) * up(x))."""

    config: LLMConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        gate = Linear(cfg.mlp_dim, ("embed", "mlp"), use_bias=False, name="gate")(x)
        up = Linear(cfg.mlp_dim, ("embed", "mlp"), use_bias=False, name="up")(x)
        hidden = constrain(ACTIVATIONS[cfg.activation](gate) * up, "batch", "length", "act_mlp")
        return Linear(cfg.width, ("mlp", "embed"), use_bias=False, name="down")(hidden)


class Layer(nn.Module):
    """One decoder layer: [shortcuts,] attention, MLP [, shortcuts].

    carry: (hidden[B, T, D], Cache or None); per layer: index int32[], route int32[A].
    Returns the carry and the named intermediates; "hidden" is the layer's input before any shortcut.
    """

    config: LLMConfig
    position: str
    intermediates: tuple[str, ...]

    @nn.compact
    def __call__(self, carry, index: jax.Array, route: jax.Array, context: Context):
        cfg, (x, cache), seen = self.config, carry, {}
        if "hidden" in self.intermediates:
            seen["hidden"] = x
        if context.bank is not None and self.position == "pre":
            x, seen["shortcut_ratio"] = inject(x, context.bank, route, context.image_start)
        y, cache = Attention(cfg, name="attention")(RMSNorm(cfg.norm_eps, name="norm1")(x), context, cache, index)
        x = constrain(x + y, "batch", "length", "act_embed")
        x = x + Mlp(cfg, name="mlp")(RMSNorm(cfg.norm_eps, name="norm2")(x))
        if context.bank is not None and self.position == "post":
            x, seen["shortcut_ratio"] = inject(x, context.bank, route, context.image_start)
        x = constrain(x, "batch", "length", "act_embed")
        return (x, cache), {name: seen[name] for name in self.intermediates if name in seen}


class Decoder(nn.Module):
    """Embeddings in, logits out.

    Attributes:
      plan: the shortcuts; its route is compiled in as data, so that all layers share one body.
      intermediates: names among INTERMEDIATES to hand out, per layer, without a second forward pass.
    """

    config: LLMConfig
    plan: Plan
    intermediates: tuple[str, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        shape = (cfg.vocab_size, cfg.width)
        self.embedding = weight(self, "embedding", shape, ("vocab", "embed"), normal(cfg.width**-0.5))
        if not cfg.tie_embeddings:
            self.head = weight(self, "head", shape[::-1], ("embed", "vocab"), fan_in(cfg.width))
        layer = Layer
        if cfg.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "dots" else None
            layer = nn.remat(Layer, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=cfg.layers,
            unroll=1 if cfg.scan_layers else cfg.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.plan.position, self.intermediates)
        self.norm = RMSNorm(cfg.norm_eps)

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32[B, T] -> [B, T, D]."""
        # The table is collected, as any fsdp weight is before its use; else the looked-up rows would be.
        table = constrain(self.embedding.astype(dtype), "vocab", None)
        return constrain(table[constrain(tokens, "batch", "length")], "batch", "length", "act_embed")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        bank: jax.Array | None = None,
        image_start: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
        """Runs all layers.

        Args:
          x: [B, T, D] embeddings, image positions already filled.
          positions: int32[B, T], rotary positions.
          mask: bool[B, T, S], what each position may see; S = T, or the length of the cache.
          bank, image_start: the shortcuts' sources [R, B, M, N, D] and where they go; None for none.
          cache: to read and extend, in generation.

        Returns:
          hidden [B, T, D] after the final norm (`logits` turns it into words), the cache, and
          {name: [L, ...]} of the intermediates that were asked for.
        """
        cfg = self.config
        keys = positions
        if cache is not None:
            keys = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))
            cache = cache.replace(positions=keys)
        # In generation the room in the cache counts, so that all keys of a text are rotated alike.
        reach = positions.max() + 1 if cache is None else keys.shape[1]
        context = Context(
            table=rotary_table(positions, cfg.head_dim, cfg.rope_theta, cfg.rope, reach),
            mask=mask,
            distance=positions[:, :, None] - keys[:, None, :] if cfg.sliding_window else None,
            bank=bank,
            image_start=image_start,
            start=None if cache is None else cache.length,
        )
        route = jnp.asarray(self.plan.route)
        (x, cache), seen = self.layers((x, cache), jnp.arange(cfg.layers), route, context)
        if cache is not None:
            cache = cache.replace(length=cache.length + x.shape[1])
        return self.norm(x), cache, seen

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32[B, T, W]."""
        head = self.embedding.T if self.config.tie_embeddings else self.head
        y = jnp.einsum("BTD,DW->BTW", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return constrain(y, "batch", "length", "act_vocab")


def empty_cache(cfg: LLMConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """Room for `length` positions of `batch` rows."""
    shape = (cfg.layers, batch, length, cfg.kv_heads, cfg.head_dim)
    positions = jnp.zeros((batch, length), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.zeros((), jnp.int32))
