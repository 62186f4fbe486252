"""Llama-style decoder into whose layers a bank of image features is injected.

Source: Llama (arXiv 2302.13971), Hugging Face `LlamaForCausalLM`; grouped-query attention (arXiv 2305.13245). Mistral,
Qwen2, Qwen3 and Phi-3 are the same decoder with other settings. The layers are scanned: parameters have a leading layer
axis, and an int per layer and source selects the row of the bank that enters there. With a plain add this costs one masked
add per layer, and only one layer is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from sparsecut_jax.models.attention import Packed, attention
from sparsecut_jax.models.injection import Injection
from sparsecut_jax.models.interfaces import Sources, Wiring
from sparsecut_jax.models.layers import (
    ACTIVATIONS,
    Linear,
    RMSNorm,
    fan_in,
    norm_ratio,
    normal,
    rotary_table,
    rotate,
    weight,
    zeros,
)
from sparsecut_jax.models.lora import add_adapter, matrices, narrow
from sparsecut_jax.models.remat import LAYER_INPUT, rematted
from sparsecut_jax.runtime.sharding import constrain, constrain_weight, ways
from sparsecut_jax.settings import InjectingConfig, LLMConfig, LoraConfig

INTERMEDIATES = ("hidden", "shortcut_ratio")


@flax.struct.dataclass
class Cache:
    """The key-value cache of generation.

    k, v: [L, B, G, S, H], the axis order in which matmuls read them without a transpose.
    positions: int32[B, S], the rotary position of each entry.
    length: int32[], how many of the S entries are filled.
    sources: what a way of injecting that acts on generated tokens keeps, [J, B, ...] each; None for other ways.
    image_start: int32[B, M], where the images of these began in the prompt, -1 for an empty slot.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    length: jax.Array
    sources: Any = None
    image_start: jax.Array | None = None


@flax.struct.dataclass
class Context:
    """The inputs that all layers share.

    table: rotary cos and sin of the T positions.
    sight: the attention mask: Packed, or bool[B, T, S] with S the length of the cache, or T without one.
    distance: int32[B, T, S], from each query back to each key; None with Packed, or if no layer has a window.
    sources: what is injected; None without images, or where nothing is.
    start: int32[], where in the cache the T positions are written; None without a cache.
    fill: whether the memory of the sources is put into the cache, rather than read from it.
    """

    table: tuple[jax.Array, jax.Array]
    sight: jax.Array | Packed
    distance: jax.Array | None = None
    sources: Sources | None = None
    start: jax.Array | None = None
    fill: bool = flax.struct.field(pytree_node=False, default=True)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    x: [B, T, D] -> ([B, T, D], the cache with layer `index`, int32[], extended by the T positions; None without one), and
    the ratio, float32[], of what a way of injecting added; None if it adds nothing here.
    """

    config: LLMConfig
    lora: LoraConfig
    backend: str

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, index: jax.Array, injection: Injection | None = None
    ):
        cfg = self.config

        def projection(name: str, heads: int, axis: str) -> Callable[[jax.Array], jax.Array]:
            """A function from [B, T, D] to [B, T, heads, H], by the layer's own matrix."""
            shape, axes = (cfg.width, heads, cfg.head_dim), ("embed", axis, "head_dim")
            kernel = weight(self, name, shape, axes, fan_in(cfg.width), x.dtype)
            adapter = matrices(self, self.lora, f"llm/layers/attention/{name}", shape, axes)
            bias = weight(self, f"{name}_bias", shape[1:], axes[1:], zeros, x.dtype) if cfg.qkv_bias else None

            def project(x: jax.Array) -> jax.Array:
                y = add_adapter(self, self.lora, x, jnp.einsum("BTD,DQH->BTQH", x, kernel), adapter)
                return constrain(y if bias is None else y + bias, "batch", "length", f"act_{axis}", None)

            return project

        kv_axis = "kv_heads" if cfg.replicate_kv else "heads"
        to_q = projection("q", cfg.heads, "heads")
        to_k, to_v = (projection(name, cfg.kv_heads, kv_axis) for name in "kv")
        q_norm, k_norm = (
            (RMSNorm(cfg.norm_eps, name=f"{name}_norm") for name in "qk") if cfg.qk_norm else [lambda y: y] * 2
        )
        q, k, v = rotate(q_norm(to_q(x)), context.table), rotate(k_norm(to_k(x)), context.table), to_v(x)
        if cache is not None:
            at = (index, 0, 0, context.start, 0)
            new = lambda x, y: jax.lax.dynamic_update_slice(x, y.swapaxes(1, 2)[None].astype(x.dtype), at)
            cache = cache.replace(k=new(cache.k, k), v=new(cache.v, v))
            k, v = cache.k[index].swapaxes(1, 2), cache.v[index].swapaxes(1, 2)
        sight, window = context.sight, cfg.sliding_window or None
        if window and not isinstance(sight, Packed):
            sight &= (context.distance < window) | (index < cfg.sliding_from)
        elif window and cfg.sliding_from:
            window = jnp.where(index < cfg.sliding_from, sight.segments.shape[1], window)
        each = lambda y: y
        if cfg.replicate_kv and cfg.kv_heads % ways("kv_heads"):
            # Every device holds all KV heads; each of its query heads gets a copy of the one it attends with.
            each = lambda y: constrain(
                jnp.repeat(y, cfg.heads // cfg.kv_heads, 2), "batch", "length", "act_heads", None
            )
        out, ratio = attention(q, each(k), each(v), sight, window, self.backend), None
        if injection is not None and injection.attends:
            stored = None if context.fill else cache.sources
            injection.remember(stored, lambda x: each(k_norm(to_k(x))), lambda x: each(to_v(x)))
            added = injection.attend(q)
            ratio = norm_ratio(added, out)
            out += added.astype(out.dtype)
        shape, axes = (cfg.heads, cfg.head_dim, cfg.width), ("heads", "head_dim", "embed")
        kernel = weight(self, "out", shape, axes, fan_in(cfg.heads * cfg.head_dim), x.dtype)
        adapter = matrices(self, self.lora, "llm/layers/attention/out", shape, axes, inputs=2)
        y = jnp.einsum("BTQH,QHD->BTD", out, kernel)
        return add_adapter(self, self.lora, out, y, adapter), cache, ratio


class Mlp(nn.Module):
    """Gated MLP: down(activation(gate(x)) * up(x))."""

    config: LLMConfig
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config

        def linear(name: str, x: jax.Array, features: int, axes: tuple[str, str]) -> jax.Array:
            y = Linear(features, axes, use_bias=False, name=name)(x)
            shape = (x.shape[-1], features)
            return add_adapter(self, self.lora, x, y, matrices(self, self.lora, f"llm/layers/mlp/{name}", shape, axes))

        # All positions as rows of one matrix; otherwise XLA writes a transposed copy of `hidden` for a kernel's gradient.
        rows = x.reshape(-1, x.shape[-1])
        gate = linear("gate", rows, cfg.mlp_dim, ("embed", "mlp"))
        up = linear("up", rows, cfg.mlp_dim, ("embed", "mlp"))
        hidden = constrain(ACTIVATIONS[cfg.activation](gate) * up, "batch", "act_mlp")
        return linear("down", hidden, cfg.width, ("mlp", "embed")).reshape(x.shape)


class Layer(nn.Module):
    """One decoder layer: attention and MLP, with what is injected before, inside or after them.

    carry: (hidden[B, T, D], Cache or None); per layer: index int32[], route int32[A].
    Returns the carry, the named intermediates ("hidden" is the layer's input before anything is injected), and the memory
    of what is injected, if that is to be put into the cache.
    """

    config: LLMConfig
    lora: LoraConfig
    wiring: Wiring
    injecting: InjectingConfig
    intermediates: tuple[str, ...]
    attention: str

    @nn.compact
    def __call__(self, carry, index: jax.Array, route: jax.Array, context: Context):
        cfg, (x, cache), seen, ratios = self.config, carry, {}, []
        x = checkpoint_name(x, LAYER_INPUT)
        if "hidden" in self.intermediates:
            seen["hidden"] = x
        injection = None
        if context.sources is not None:
            injection = Injection(self.wiring, self.injecting, context.sources, index, route)
            if injection.remembers and not injection.attends:
                injection.remember(None if context.fill else cache.sources)
            x, ratio = injection.at("before", x)
            ratios.append(ratio)
        y = RMSNorm(cfg.norm_eps, name="norm1")(x)
        attend = Attention(cfg, self.lora, self.attention, name="attention")
        y, cache, ratio = attend(y, context, cache, index, injection)
        ratios.append(ratio)
        x = constrain(x + y, "batch", "length", "act_embed")
        x = x + Mlp(cfg, self.lora, name="mlp")(RMSNorm(cfg.norm_eps, name="norm2")(x))
        if injection is not None:
            x, ratio = injection.at("after", x)
            ratios.append(ratio)
        if ratios := [ratio for ratio in ratios if ratio is not None]:
            seen["shortcut_ratio"] = jnp.broadcast_to(functools.reduce(jnp.maximum, ratios), route.shape)
        x = constrain(x, "batch", "length", "act_embed")
        seen = {name: seen[name] for name in self.intermediates if name in seen}
        keep = injection is not None and cache is not None and context.fill
        return (x, cache), (seen, injection.here.memory if keep else None)


class Decoder(nn.Module):
    """Embeddings in, logits out.

    Attributes:
      wiring: which sources enter which layer; compiled in as data, so that all layers share one body.
      intermediates: names from INTERMEDIATES to return, per layer, from the same forward pass.
      attention: backend for packed sequences, see models/attention.py.
      lora: adapters of the LLM's weight matrices.
      injecting: the settings of the ways of injecting.
    """

    config: LLMConfig
    wiring: Wiring
    intermediates: tuple[str, ...] = ()
    attention: str = "xla"
    lora: LoraConfig = LoraConfig()
    injecting: InjectingConfig = InjectingConfig()

    def setup(self) -> None:
        cfg = self.config
        shape = (cfg.vocab_size, cfg.width)
        self.embedding = weight(self, "embedding", shape, ("vocab", "embed"), normal(cfg.width**-0.5))
        if not cfg.tie_embeddings:
            axes = ("embed", "vocab")
            self.head = weight(self, "head", shape[::-1], axes, fan_in(cfg.width))
            self.head_adapter = matrices(self, self.lora, "llm/head", shape[::-1], axes)
        self.layers = nn.scan(
            rematted(Layer, cfg.remat, cfg.scan_layers),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),
            length=cfg.layers,
            unroll=1 if cfg.scan_layers else cfg.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.lora, self.wiring, self.injecting, self.intermediates, self.attention)
        self.norm = RMSNorm(cfg.norm_eps)

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32[B, T] -> [B, T, D]."""
        # Each device looks up its columns for the rows of all fsdp devices, then an all-to-all gives it whole rows of
        # its own: this moves less than an all-gather of the table would, and the table's gradient stays sharded.
        table = constrain_weight(self.embedding.astype(dtype), "vocab", "embed")
        columns = table[constrain(tokens, "batch_of_copies", "length")]
        return constrain(constrain(columns, "batch_of_copies", "length", "embed"), "batch", "length", "act_embed")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        sight: jax.Array | Packed,
        sources: Sources | None = None,
        cache: Cache | None = None,
        lengths: jax.Array | None = None,
        fill: bool = True,
    ) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
        """Runs all layers.

        Args:
          x: [B, T, D] embeddings, image positions already filled.
          positions: int32[B, T], rotary positions.
          sight: the attention mask: Packed, or bool[B, T, S] with S = T or the length of the cache.
          sources: what is injected; None for nothing.
          cache: to read and extend, in generation.
          lengths: int32[B, 1] or [B, T], length of the text at each position, which selects the factors of longrope
            (`rotary_table`); None: the length of each segment, or of each row of x.
          fill: whether the memory of the sources is put into the cache; False: it is there.

        Returns:
          hidden [B, T, D] after the final norm (for `logits`), the cache, and {name: [L, ...]} of the intermediates.
        """
        cfg = self.config
        keys = positions
        if cache is not None:
            keys = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))
            cache = cache.replace(positions=keys)
        if lengths is None and cfg.rope.kind == "longrope":
            lengths = sight.lengths() if isinstance(sight, Packed) else positions.max(1, keepdims=True) + 1
        distance = positions[:, :, None] - keys[:, None, :]
        context = Context(
            table=rotary_table(positions, cfg.head_dim, cfg.rope_theta, cfg.rope, lengths),
            sight=sight,
            distance=None if isinstance(sight, Packed) or not cfg.sliding_window else distance,
            sources=sources,
            start=None if cache is None else cache.length,
            fill=fill,
        )
        route = jnp.asarray(self.wiring.route)
        (x, cache), (seen, memory) = self.layers((x, cache), jnp.arange(cfg.layers), route, context)
        if cache is not None:
            cache = cache.replace(length=cache.length + x.shape[1])
        if memory is not None:
            layers = np.flatnonzero(self.wiring.sites >= 0)
            cache = cache.replace(sources=jax.tree.map(lambda x: x[layers], memory), image_start=sources.image_start)
        return self.norm(x), cache, seen

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32[B, T, W]."""
        return word_logits(*self.to_words(hidden))

    def to_words(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, D] -> [B, T, D'] and [D', W], whose product is the logits; D' > D if the head has an adapter."""
        if self.config.tie_embeddings:
            return hidden, constrain_weight(self.embedding.astype(hidden.dtype), "vocab", "embed").T
        head = constrain_weight(self.head.astype(hidden.dtype), "embed", "vocab")
        if self.head_adapter is None:
            return hidden, head
        a, b = self.head_adapter
        wider = jnp.concatenate([hidden, narrow(self, self.lora, hidden, a)], -1)
        return wider, jnp.concatenate([head, b.astype(hidden.dtype)])


def word_logits(hidden: jax.Array, words: jax.Array) -> jax.Array:
    """[B, T, D] @ [D, W] -> float32[B, T, W]."""
    y = jnp.einsum("BTD,DW->BTW", hidden, words, preferred_element_type=jnp.float32)
    return constrain(y, "batch", "length", "act_vocab")


def empty_cache(cfg: LLMConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """A cache with room for `length` positions of `batch` rows."""
    shape = (cfg.layers, batch, cfg.kv_heads, length, cfg.head_dim)
    positions = jnp.zeros((batch, length), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.zeros((), jnp.int32))
