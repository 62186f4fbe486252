"""Converts the settings of tower and LLM to Hugging Face's config.json; architecture.py does the reverse."""

from __future__ import annotations

from typing import Any

from sparsecut_jax.settings import LLMConfig, VisionConfig
from sparsecut_jax.types import UserError


def vision_config_json(cfg: VisionConfig, depth: int) -> dict[str, Any]:
    """config.json of a tower cut to its first `depth` blocks. Raises UserError if its family lacks one of the settings."""
    family = cfg.family
    expected = {
        "clip": (True, False, True, False), "siglip": (False, True, False, False),
        "siglip2": (False, True, False, False), "dinov2": (True, True, False, True),
    }[family]  # fmt: skip
    has = (cfg.class_token, cfg.patch_bias, cfg.pre_norm, cfg.layer_scale)
    if has != expected:
        raise UserError(
            f"a {family} tower has class_token, patch_bias, pre_norm, layer_scale = {expected}, this one has {has}; "
            "set config.vision.family to what the tower is"
        )
    config = {
        "model_type": family if family == "dinov2" else f"{family}_vision_model",
        "architectures": [{"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel", "dinov2": "Dinov2Model"}[family]],
        "hidden_size": cfg.width,
        "num_hidden_layers": depth,
        "num_attention_heads": cfg.heads,
        "num_channels": 3,
        "patch_size": cfg.patch_size,
        "hidden_act": _their_activation(cfg.activation),
        "layer_norm_eps": cfg.norm_eps,
    }  # fmt: skip
    if family == "siglip2":
        config["num_patches"] = (cfg.image_size // cfg.patch_size) ** 2
    else:
        config["image_size"] = cfg.image_size
    if family in ("siglip", "siglip2"):
        config["vision_use_head"] = False
    if family == "dinov2":
        if cfg.mlp_dim % cfg.width:
            raise UserError(
                f"a dinov2 tower needs an mlp_dim that is a multiple of its width; got {cfg.mlp_dim} and {cfg.width}"
            )
        config |= {"mlp_ratio": cfg.mlp_dim // cfg.width, "qkv_bias": True, "use_swiglu_ffn": False}
        config["use_mask_token"] = False
    else:
        config["intermediate_size"] = cfg.mlp_dim
    return config


def llm_config_json(cfg: LLMConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """config.json of the LLM. special: ids of special tokens. Raises UserError if its family lacks one of the settings."""
    family, rope = cfg.family, cfg.rope
    expected = {"qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    if family == "llama":
        expected["sliding_window"] = 0
    if family in ("llama", "mistral", "phi3"):
        expected["sliding_from"] = 0
    for name, value in expected.items():
        if getattr(cfg, name) != value:
            raise UserError(
                f"config.llm.{name}={getattr(cfg, name)!r} cannot be written as a {family} model, where it is {value!r}; "
                "set config.llm.family to what the model is"
            )
    if family == "phi3" and cfg.head_dim * cfg.heads != cfg.width:
        raise UserError(
            f"a phi3 model needs head_dim = width / heads; got {cfg.head_dim} and {cfg.width} / {cfg.heads}"
        )
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": cfg.rope_theta}
    config = {
        "model_type": family,
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM"}[family]],
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "hidden_act": _their_activation(cfg.activation),
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,  # for programs that expect the older format
        "rope_parameters": parameters,
        "tie_word_embeddings": cfg.tie_embeddings,
        **special,
    }  # fmt: skip
    if family != "phi3":
        config["head_dim"] = cfg.head_dim
    if cfg.max_positions:
        config["max_position_embeddings"] = cfg.max_positions
    if family in ("mistral", "phi3"):
        config["sliding_window"] = cfg.sliding_window or None
    if family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = cfg.sliding_window > 0
        config["sliding_window"] = cfg.sliding_window or None
        config["max_window_layers"] = cfg.sliding_from if cfg.sliding_window else cfg.layers
    if rope.kind in ("linear", "llama3"):
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "longrope":
        parameters |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
        parameters["attention_factor"] = rope.attention_factor
    if rope.kind in ("llama3", "longrope"):
        parameters["original_max_position_embeddings"] = rope.original_length
        config["original_max_position_embeddings"] = rope.original_length
    return config


def _their_activation(name: str) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)
