"""config.json of Hugging Face <-> the settings of tower and LLM, so that nobody retypes widths.

transformers' configuration classes fill in what a config.json leaves out and read older spellings; no model code of
theirs is loaded, and none of a checkpoint's own is ever run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from typing import Any

from sparsecut_jax.settings import LLMConfig, RopeConfig, VisionConfig
from sparsecut_jax.types import UserError

TOWER_TYPES = {
    "clip": "clip", "clip_vision_model": "clip", "siglip": "siglip", "siglip_vision_model": "siglip",
    "siglip2": "siglip2", "siglip2_vision_model": "siglip2", "dinov2": "dinov2",
}  # fmt: skip
LLM_TYPES = {name: name for name in ("llama", "mistral", "qwen2", "qwen3", "phi3")}
# LLaVA's own checkpoints, SparseCut's among them, say "llava" or "llava_llama" and keep Llama's keys beside theirs.
LLM_TYPES |= {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu",
}  # fmt: skip
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS = {"siglip": HALF, "siglip2": HALF, "dinov2": IMAGENET}  # mean and std where no preprocessor_config.json is


def vision_settings(config: dict[str, Any], file: str, processor: dict[str, Any]) -> dict[str, Any]:
    """Fields of VisionConfig from a tower's config.json (or that of a whole model) and preprocessor_config.json.

    Raises:
      UserError: an architecture, or a property of it, that the tower here does not have.
    """
    refuse_remote_code(config, file)
    kind = config.get("model_type")
    nested = config.get("vision_config")
    if isinstance(nested, dict):
        outer = kind if isinstance(kind, str) and kind in TOWER_TYPES else "clip_vision_model"
        kind = nested.get("model_type", outer)
        config = nested
    family = _known(kind, TOWER_TYPES, file, "vision tower")
    hf = _hf_config({"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}.get(family, family), config, file)  # fmt: skip
    mean, std = PIXELS.get(family, (VisionConfig.mean, VisionConfig.std))
    if family == "siglip2":
        side = math.isqrt(max(0, hf.num_patches))
        _need(side**2 == hf.num_patches, file, f"num_patches={hf.num_patches} is no square")
        image_size = side * hf.patch_size
    else:
        image_size = hf.image_size
    _need(
        type(image_size) is int and type(hf.patch_size) is int, file, "image_size and patch_size must be whole numbers"
    )
    _need(hf.num_channels == 3, file, f"num_channels={hf.num_channels}; expected 3")
    if family == "dinov2":
        _need(not hf.use_swiglu_ffn, file, "use_swiglu_ffn=true (the giant size) is not supported")
        _need(hf.qkv_bias, file, "qkv_bias=false is not supported")
    return {
        "family": family,
        "image_size": image_size,
        "patch_size": hf.patch_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "mlp_dim": int(hf.hidden_size * hf.mlp_ratio) if family == "dinov2" else hf.intermediate_size,
        "activation": _known(hf.hidden_act, ACTIVATIONS, file, "activation"),
        "norm_eps": hf.layer_norm_eps,
        "class_token": family in ("clip", "dinov2"),
        "patch_bias": family != "clip",
        "pre_norm": family == "clip",
        "layer_scale": family == "dinov2",
        "mean": _colours(processor, "image_mean", mean, file),
        "std": _colours(processor, "image_std", std, file),
    }


def llm_settings(config: dict[str, Any], file: str) -> dict[str, Any]:
    """Fields of LLMConfig from an LLM's config.json, or that of a whole model.

    Raises:
      UserError: an architecture, or a property of it, that the decoder here does not have.
    """
    refuse_remote_code(config, file)
    tied = config.get("tie_word_embeddings")
    if isinstance(config.get("text_config"), dict):
        config = {"model_type": "llama", **config["text_config"]}
    family = _known(config.get("model_type"), LLM_TYPES, file, "language model")
    hf = _hf_config(family, config, file)
    for name in ("attention_bias", "mlp_bias"):
        _need(not getattr(hf, name, False), file, f"{name}=true is not supported")
    _need(hf.num_attention_heads >= 1, file, f"num_attention_heads={hf.num_attention_heads}; expected at least 1")
    windowed = family in ("mistral", "phi3") or family in ("qwen2", "qwen3") and hf.use_sliding_window
    window = (hf.sliding_window or 0) if windowed else 0
    first = hf.max_window_layers if window and family in ("qwen2", "qwen3") else 0
    types = getattr(hf, "layer_types", None)
    if types and types != [
        "sliding_attention" if window and i >= first else "full_attention" for i in range(len(types))
    ]:
        raise UserError(f"{file}: layer_types={types} is not supported; expected a window from max_window_layers on")
    return {
        "family": family,
        "vocab_size": hf.vocab_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "mlp_dim": hf.intermediate_size,
        "activation": _known(hf.hidden_act, ACTIVATIONS, file, "activation"),
        "norm_eps": hf.rms_norm_eps,
        "rope_theta": _positive(hf.rope_parameters, "rope_theta", file),
        "rope": _rope_settings(hf, file),
        "max_positions": hf.max_position_embeddings,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "sliding_window": window,
        "sliding_from": min(first, hf.num_hidden_layers),
        "tie_embeddings": bool(hf.tie_word_embeddings if tied is None else tied),
    }


def _rope_settings(hf: Any, file: str) -> dict[str, Any]:
    """Fields of RopeConfig from `rope_parameters`, as transformers has put them together."""
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    _need(
        kind in ("default", "linear", "llama3", "longrope"),
        file,
        f"rope_type={kind!r} is not supported; supported are default, linear, llama3 and longrope",
    )
    partial = rope.get("partial_rotary_factor", 1.0)
    _need(partial == 1.0, file, f"partial_rotary_factor={partial} is not supported; expected 1.0")
    values: dict[str, Any] = dataclasses.asdict(RopeConfig(kind=kind))
    if kind in ("linear", "llama3"):
        values["factor"] = _positive(rope, "factor", file)
    if kind == "llama3":
        low, high = (_positive(rope, f"{name}_freq_factor", file) for name in ("low", "high"))
        _need(low < high, file, f"low_freq_factor={low} must be below high_freq_factor={high}")
        values |= {"low_freq_factor": low, "high_freq_factor": high}
        values["original_length"] = int(_positive(rope, "original_max_position_embeddings", file))
    if kind == "longrope":
        original = int(_positive(rope, "original_max_position_embeddings", file))
        _need(original > 1, file, f"original_max_position_embeddings={original}; expected more than 1")
        half = (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads) // 2
        for name in ("short_factor", "long_factor"):
            found = rope.get(name)
            _need(isinstance(found, list) and len(found) == half, file, f"{name}={found!r}; expected {half} numbers")
            values[name] = tuple(_positive({name: value}, name, file) for value in found)
        # How much longer texts may be than the original ones (arXiv 2402.13753, and HF's `longrope`).
        stretch = _positive(rope, "factor", file, hf.max_position_embeddings / original)
        default = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
        values["original_length"] = original
        values["attention_factor"] = _positive(rope, "attention_factor", file, default)
    return values


def vision_config_json(cfg: VisionConfig, depth: int) -> dict[str, Any]:
    """config.json of a tower with its first `depth` blocks. Raises UserError if its family cannot say these settings."""
    family = cfg.family
    says = {
        "clip": (True, False, True, False), "siglip": (False, True, False, False),
        "siglip2": (False, True, False, False), "dinov2": (True, True, False, True),
    }[family]  # fmt: skip
    has = (cfg.class_token, cfg.patch_bias, cfg.pre_norm, cfg.layer_scale)
    if has != says:
        raise UserError(
            f"a {family} tower has class_token, patch_bias, pre_norm, layer_scale = {says}, this one has {has}; "
            "it cannot be written as config.vision.family says"
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
                f"a dinov2 tower has mlp_dim = width times a whole number; here {cfg.mlp_dim} and {cfg.width}"
            )
        config |= {"mlp_ratio": cfg.mlp_dim // cfg.width, "qkv_bias": True, "use_swiglu_ffn": False}
        config["use_mask_token"] = False
    else:
        config["intermediate_size"] = cfg.mlp_dim
    return config


def llm_config_json(cfg: LLMConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """config.json of the LLM. Raises UserError if its family cannot say these settings."""
    family, rope = cfg.family, cfg.rope
    says = {"qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    if family == "llama":
        says["sliding_window"] = 0
    if family in ("llama", "mistral", "phi3"):
        says["sliding_from"] = 0
    for name, value in says.items():
        if getattr(cfg, name) != value:
            raise UserError(
                f"config.llm.{name}={getattr(cfg, name)!r} cannot be written as a {family} model, where it is {value!r}; "
                "set config.llm.family to what the model is"
            )
    if family == "phi3" and cfg.head_dim * cfg.heads != cfg.width:
        raise UserError(f"a phi3 model has head_dim = width / heads; here {cfg.head_dim} and {cfg.width} / {cfg.heads}")
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
        "rope_theta": cfg.rope_theta,  # for readers of the older spelling
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


def refuse_remote_code(config: dict[str, Any], file: str) -> None:
    """Raises UserError if the architecture, or that of a part, is code of the checkpoint's own."""
    parts = (config, config.get("text_config"), config.get("vision_config"))
    if any(isinstance(part, dict) and "auto_map" in part for part in parts):
        raise UserError(
            f"{file}: 'auto_map' asks for code that comes with the checkpoint, which is never run here; where model_type "
            "says all there is to know, remove that key"
        )


def _hf_config(model_type: str, config: dict[str, Any], file: str) -> Any:
    """transformers' configuration object, with its defaults and its own checks."""
    from transformers import CONFIG_MAPPING  # imported here: it takes seconds, and the default never needs it

    try:
        return CONFIG_MAPPING[model_type](**{k: v for k, v in config.items() if k != "model_type"})
    except Exception as error:  # what transformers raises depends on the key that is wrong
        reason = " ".join((str(error.__cause__ or error).strip() or repr(error)).split())
        raise UserError(f"{file} is no configuration of a {model_type} model: {reason[:300]}") from error


def _known(value: Any, table: dict[str, str], file: str, what: str) -> str:
    if not isinstance(value, str) or value not in table:
        raise UserError(f"{file}: {what} {value!r} is not supported; supported are {', '.join(table)}")
    return table[value]


def _positive(values: dict[str, Any], name: str, file: str, default: float | None = None) -> float:
    """A number above 0, or the `default` where there is none."""
    value = default if values.get(name) is None else values[name]
    ok = type(value) in (int, float) and 0 < value <= sys.float_info.max
    _need(ok, file, f"{name}={value!r}; expected a positive number")
    return float(value)


def _colours(processor: dict[str, Any], name: str, default: tuple[float, ...], file: str) -> tuple[float, ...]:
    """Three numbers of preprocessor_config.json, which is beside `file`."""
    found = processor.get(name) or default
    numbers = found if isinstance(found, (list, tuple)) else ()
    ok = len(numbers) == 3 and all(type(v) in (int, float) and abs(v) < 1e9 for v in numbers)
    _need(ok, os.path.join(os.path.dirname(file), "preprocessor_config.json"), f"{name}={found!r}; expected 3 numbers")
    return tuple(map(float, found))


def _their_activation(name: str) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def _need(ok: bool, file: str, sentence: str) -> None:
    if not ok:
        raise UserError(f"{file}: {sentence}")
