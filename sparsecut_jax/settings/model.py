"""Settings of the model: its parts, and how they are wired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsecut_jax.settings.fields import setting

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
Remat = Literal["auto", "none", "dots", "full", "offload"]

REMAT = (
    "What a layer keeps for the backward pass: everything (none), matmul results (dots), its input (full; offload: in "
    "host memory); auto: full, on CPUs none."
)


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower: CLIP, SigLIP or DINOv2, depending on its fields."""

    family: Literal["clip", "siglip", "siglip2", "dinov2"] = setting(
        "clip", "Model family, which sets the tensor names and config.json of its files."
    )
    image_size: int = setting(32, "Side of one view in pixels.")
    patch_size: int = setting(8, "Side of a patch in pixels; a patch is one token.")
    width: int = setting(64, "Channels of a token (C).")
    layers: int = setting(12, "Number of transformer blocks.")
    heads: int = setting(4, "Attention heads; they divide width.")
    mlp_dim: int = setting(256, "Hidden channels of the MLP.")
    activation: Activation = setting("quick_gelu", "Activation function of the MLP.")
    norm_eps: float = setting(1e-5, "Epsilon of the layer norms.")
    class_token: bool = setting(True, "Prepend a class token; it is never passed to the LLM.")
    patch_bias: bool = setting(False, "Add a bias to the patch embedding.")
    pre_norm: bool = setting(True, "Apply a layer norm before the first block (CLIP).")
    layer_scale: bool = setting(False, "Scale each channel after attention and after the MLP (DINOv2).")
    select_layer: int = setting(
        -2, "Main feature, as an index into Hugging Face's hidden_states; -2 is the output of the second-to-last block."
    )
    scan_layers: bool = setting(True, "Compile the blocks as one loop, which compiles faster than unrolled blocks.")
    remat: Remat = setting("auto", REMAT)
    mean: tuple[float, ...] = setting(
        (0.48145466, 0.4578275, 0.40821073), "Mean of red, green and blue, subtracted from values in 0 to 1."
    )
    std: tuple[float, ...] = setting(
        (0.26862954, 0.26130258, 0.27577711), "Standard deviation of red, green and blue, in 0 to 1."
    )


@dataclass(frozen=True)
class FusionConfig:
    """How low- and hi-res tokens of a level become tokens of the LLM."""

    name: str = setting("channel", "Way of fusing: the name of a file in models/fusing.")
    shared: bool = setting(True, "Use one set of weights for the main feature and all shortcut levels.")
    grid: tuple[int, ...] = setting((2, 2), "Rows and columns of hi-res crops of an image.")
    norm_levels: bool = setting(
        False,
        "Standardise the channels of each tower level, by statistics of training pictures taken before the first step.",
    )
    remat: Literal["auto", "none", "dots", "full"] = setting("auto", "As vision.remat, for the fusion module.")


@dataclass(frozen=True)
class InjectingConfig:
    """How sources enter the layers of the LLM; the way of fusing says which of these it uses."""


@dataclass(frozen=True)
class ShortcutConfig:
    """Which tower levels enter which LLM layers. The defaults are the paper's plan."""

    density: Literal[
        "none", "dense", "sparse", "explicit", "random", "qwen3vl", "deepstack", "granite4", "lin_3_18_23"
    ] = setting(
        "sparse",
        "Levels with a shortcut: none, all (dense), count of them (sparse), vit_levels (explicit); or a whole plan by name, "
        "see models/plans.py.",
    )
    count: int = setting(8, "Number of shortcuts of a sparse, random, qwen3vl or deepstack plan.")
    seed: int = setting(0, "Seed of a random plan.")
    distribution: Literal["uniform", "bottom", "top"] = setting(
        "uniform", "LLM layers that shortcuts enter: evenly spaced, the first ones (bottom) or the last ones (top)."
    )
    order: Literal["u", "parallel"] = setting(
        "u", "The deepest level enters the earliest LLM layer (u), or the latest one (parallel)."
    )
    position: Literal["pre", "post"] = setting(
        "pre", "Add before (pre) or after (post) the LLM layer; qwen3vl: after it."
    )
    feature_order_reverse: bool = setting(
        False,
        "Count levels from the deepest block and take block 0 as main feature, as the released code's option does.",
    )
    vit_levels: tuple[int, ...] = setting((), "Tower level of each shortcut of an explicit plan, from 0.")
    llm_layers: tuple[int, ...] = setting((), "LLM layer of each shortcut of an explicit plan, from 0.")


@dataclass(frozen=True)
class RopeConfig:
    """How rotary frequencies are scaled for longer texts; `llm.rope_theta` is their base."""

    kind: Literal["default", "linear", "llama3", "longrope"] = setting(
        "default", "Scaling rule; default scales nothing."
    )
    factor: float = setting(1.0, "linear, llama3: frequencies are divided by this.")
    low_freq_factor: float = setting(
        1.0, "llama3: wavelengths above original_length / this (in positions) are scaled in full."
    )
    high_freq_factor: float = setting(
        4.0, "llama3: wavelengths below original_length / this (in positions) are not scaled."
    )
    original_length: int = setting(0, "llama3, longrope: context length of the original training, in positions.")
    short_factor: tuple[float, ...] = setting(
        (), "longrope: divisor of each frequency in texts of up to original_length positions."
    )
    long_factor: tuple[float, ...] = setting((), "longrope: divisor of each frequency in longer texts.")
    attention_factor: float = setting(1.0, "longrope: multiplies cos and sin.")


@dataclass(frozen=True)
class LLMConfig:
    """Decoder: Llama, Mistral, Qwen2, Qwen3 or Phi-3, depending on its fields."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "phi3"] = setting(
        "llama", "Model family, which sets the tensor names and config.json of its files."
    )
    vocab_size: int = setting(0, "Rows of the embedding; 0: the tokenizer's ids, rounded up to a multiple of 64.")
    width: int = setting(64, "Channels of a token (D).")
    layers: int = setting(12, "Number of decoder layers.")
    heads: int = setting(4, "Query heads.")
    kv_heads: int = setting(2, "Key and value heads; they divide heads.")
    head_dim: int = setting(16, "Channels of a head, an even number.")
    mlp_dim: int = setting(192, "Hidden channels of the MLP.")
    activation: Activation = setting("silu", "Activation function of the MLP.")
    norm_eps: float = setting(1e-5, "Epsilon of the RMS norms.")
    rope_theta: float = setting(10000.0, "Base of the rotary frequencies.")
    rope: RopeConfig = RopeConfig()
    max_positions: int = setting(0, "Context length in tokens, for exported files; 0: unknown.")
    qkv_bias: bool = setting(False, "Add a bias to queries, keys and values (Qwen2).")
    qk_norm: bool = setting(False, "Normalise each head of queries and keys before the rotation (Qwen3).")
    sliding_window: int = setting(0, "Positions that a token attends to, itself included (Mistral); 0: all before it.")
    sliding_from: int = setting(0, "First layer with a sliding window (Qwen2's max_window_layers).")
    tie_embeddings: bool = setting(False, "Use the embedding's weights for the output layer too.")
    scan_layers: bool = setting(True, "Compile the layers as one loop, which compiles faster than unrolled layers.")
    remat: Remat = setting("auto", REMAT)
    replicate_kv: bool = setting(
        False, "Give every device of the tensor axis all key and value heads, where kv_heads cannot be split over it."
    )

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the weight matrices that can have an adapter, without "/kernel"."""
        attention = tuple(f"llm/layers/attention/{name}" for name in ("q", "k", "v", "out"))
        mlp = tuple(f"llm/layers/mlp/{name}" for name in ("gate", "up", "down"))
        return attention + mlp + (() if self.tie_embeddings else ("llm/head",))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the LLM (arXiv 2106.09685), as parameters `..._lora_a` and `..._lora_b`."""

    rank: int = setting(0, "Rank of the adapters; 0: no adapters.")
    alpha: float = setting(256.0, "An adapter's output is multiplied by alpha / rank.")
    dropout: float = setting(0.0, "Probability that an adapter's input is dropped in training, 0 to below 1.")
    targets: tuple[str, ...] = setting(
        ("llm/layers/attention/(q|k|v|out)", "llm/layers/mlp/(gate|up|down)"),
        "Regular expressions for the matrices that get an adapter.",
    )
