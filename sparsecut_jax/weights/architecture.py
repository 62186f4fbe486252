"""Converts Hugging Face's config.json to the settings of tower, LLM, fusion and shortcuts; config_json.py does the reverse.

transformers' configuration classes fill in missing keys and read older formats. Their model code is not loaded, and a
checkpoint's own code is never run.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from sparsecut_jax import checks
from sparsecut_jax.models import ways
from sparsecut_jax.models.rules import LLAVA_OFFICIAL
from sparsecut_jax.settings import RopeConfig, ShortcutConfig, VisionConfig
from sparsecut_jax.tasks.registry import TASKS
from sparsecut_jax.types import UserError

TOWER_TYPES = {
    "clip": "clip", "clip_vision_model": "clip", "siglip": "siglip", "siglip_vision_model": "siglip",
    "siglip2": "siglip2", "siglip2_vision_model": "siglip2", "dinov2": "dinov2",
}  # fmt: skip
LLM_TYPES = {name: name for name in ("llama", "mistral", "qwen2", "qwen3", "phi3")}
# The official checkpoints of LLaVA and SparseCut say "llava" or "llava_llama" and have Llama's keys beside their own.
LLM_TYPES |= {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu",
}  # fmt: skip
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ROPE_NAMES = {"original_length": "original_max_position_embeddings"}
PIXELS = {"siglip": HALF, "siglip2": HALF, "dinov2": IMAGENET}  # mean and std if there is no preprocessor_config.json


def vision_settings(config: dict[str, Any], file: str, processor: dict[str, Any]) -> dict[str, Any]:
    """Fields of VisionConfig from a tower's config.json (or that of a whole model) and preprocessor_config.json.

    Raises:
      UserError: an unsupported architecture, or a property that the tower here does not have.
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
        _need(side**2 == hf.num_patches, file, f"num_patches={hf.num_patches} is not a square number")
        image_size = side * hf.patch_size
    else:
        image_size = hf.image_size
    _need(type(image_size) is int and type(hf.patch_size) is int, file, "image_size and patch_size must be integers")
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
      UserError: an unsupported architecture, or a property that the decoder here does not have.
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
    """Fields of RopeConfig from `rope_parameters`, as completed by transformers."""
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    _need(
        kind in ("default", "linear", "llama3", "longrope"),
        file,
        f"rope_type={kind!r} is not supported; supported are default, linear, llama3 and longrope",
    )
    partial = rope.get("partial_rotary_factor", 1.0)
    _need(partial == 1.0, file, f"partial_rotary_factor={partial} is not supported; expected 1.0")
    # Fields of RopeConfig that the kind reads, as the file has them; the names that differ are in ROPE_NAMES.
    fields = {name: rope.get(ROPE_NAMES.get(name, name)) for name in checks.ROPE_FIELDS[kind]}
    fields.pop("attention_factor", None)  # it has a default of its own, below
    values = dataclasses.asdict(RopeConfig(kind=kind)) | fields
    half = (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads) // 2
    if fault := checks.rope_fault(values, half):
        name, value, expected = fault
        raise UserError(f"{file}: {ROPE_NAMES.get(name, name)}={value!r}; expected {expected}")
    if "original_length" in fields:
        values["original_length"] = int(values["original_length"])
    if kind == "longrope":
        # Extension factor of the context length (arXiv 2402.13753, and HF's `longrope`).
        original = values["original_length"]
        stretch = _positive(rope, "factor", file, hf.max_position_embeddings / original)
        default = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
        values["attention_factor"] = _positive(rope, "attention_factor", file, default)
    as_floats = lambda x: tuple(map(float, x)) if isinstance(x, (list, tuple)) else float(x)
    return values | {name: as_floats(values[name]) for name in fields if name != "original_length"}


def official_settings(config: dict[str, Any], file: str) -> dict[str, dict[str, Any]]:
    """Settings of fusion, main feature and shortcuts in the config.json of an official projector; {} if it has none."""
    groups: dict[str, dict[str, Any]] = {}
    if "mm_projector_type" in config:
        kind = config["mm_projector_type"]
        groups["fusion"] = {"name": _known(kind, official_fusions(), file, "mm_projector_type")}
    if "mm_vision_select_layer" in config:
        groups["vision"] = {"select_layer": config["mm_vision_select_layer"]}
    if "vit_levels" in config and "llm_layers" in config:
        levels, layers = config["vit_levels"], config["llm_layers"]
        if not isinstance(levels, list) or not isinstance(layers, list):
            raise UserError(f"{file}: expected lists vit_levels and llm_layers, got {levels!r} and {layers!r}")
        groups["shortcuts"] = {
            "density": "explicit" if levels else "none",
            "vit_levels": levels,
            "llm_layers": layers,
            "feature_order_reverse": config.get("feature_order_reverse", False),
        }
    return groups


def official_fusions() -> dict[str, str]:
    """{`mm_projector_type` in official files: the way of fusing}."""
    return {way.OFFICIAL: name for name, way in ways.FUSING.items() if hasattr(way, "OFFICIAL")}


def whole_settings(config: dict[str, Any], file: str, class_token: bool) -> dict[str, dict[str, Any]]:
    """Fusion and shortcuts of a whole model: LLaVA's and none for LLaVA, those in config.json for ours.

    class_token: whether the tower has a class token, the only one that the LLM does not get.
    """
    kind, select = config.get("model_type"), config.get("vision_feature_layer", -2)
    if kind == "llava" and isinstance(config.get("text_config"), dict):
        if type(select) is not int:
            raise UserError(f"{file}: vision_feature_layer={select!r} is not supported; expected one layer")
        if config.get("projector_hidden_act", "gelu") != "gelu":
            raise UserError(f"{file}: projector_hidden_act={config['projector_hidden_act']!r}; expected 'gelu'")
        strategy = config.get("vision_feature_select_strategy", "default")
        expected = "default" if class_token else "full"  # all tokens but the class token
        if strategy != expected:
            raise UserError(
                f"{file}: vision_feature_select_strategy={strategy!r} is not supported here; expected {expected!r}"
            )
        none = {"density": "none", "vit_levels": (), "llm_layers": (), "feature_order_reverse": False}
        return {
            "fusion": {"name": official_fusions()[LLAVA_OFFICIAL], "shared": True},
            "shortcuts": none,
            "vision": {"select_layer": select},
        }
    if kind != "sparsecut":
        raise UserError(
            f"{file}: model_type {kind!r} is not a whole model in LLaVA's layout; set its parts as config.init.vision, "
            ".llm and .fusion"
        )
    try:
        fusion, shortcuts = config["fusion"], config["shortcuts"]
        name = _known(fusion["name"], {way: way for way in ways.FUSING}, file, "fusion")
        common = {"name": name, "shared": fusion["shared"], "grid": fusion.get("grid", (2, 2))}
        own = {name: fusion[name]} if name in fusion else {}
        levels, layers = tuple(shortcuts["vit_levels"]), tuple(shortcuts["llm_layers"])
        wired = {"density": "explicit" if levels else "none", "feature_order_reverse": False}
        wired |= {
            field.name: shortcuts[field.name] for field in dataclasses.fields(ShortcutConfig) if field.name in shortcuts
        }
        task = config.get("task", {})
        named = {"name": _known(task["name"], {name: name for name in TASKS}, file, "task")} if task else {}
        asked = {name: values for name, values in task.items() if name != "name"}
        return {
            "fusion": common | _settings_of_ways(own, ways.FUSING, file, "fusion"),
            "injecting": _settings_of_ways(config.get("injecting", {}), ways.INJECTING, file, "injecting"),
            "task": named | _settings_of_ways(asked, TASKS, file, "task"),
            "shortcuts": wired | {"vit_levels": levels, "llm_layers": layers, "position": shortcuts["position"]},
            "vision": {"select_layer": select},
            "data": {"image_fit": config["image_fit"]},
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: 'fusion' or 'shortcuts' is not as convert to-hf writes it: {error!r}") from error


def _settings_of_ways(
    groups: dict[str, dict[str, Any]], known: Mapping[str, ModuleType], file: str, what: str
) -> dict[str, dict[str, Any]]:
    """{way: its own settings} as `convert to-hf` writes them. Raises UserError for an unknown way or setting."""
    for way, values in groups.items():
        _known(way, {name: name for name in known}, file, what)
        kind = getattr(known[way], "Settings", None)
        names = [field.name for field in dataclasses.fields(kind)] if kind else []
        for name in values:
            _need(name in names, file, f"{what}.{way}.{name} is not a setting; known are {', '.join(names) or 'none'}")
    return groups


def refuse_remote_code(config: dict[str, Any], file: str) -> None:
    """Raises UserError if the architecture of the model or a part is defined by code in the checkpoint."""
    parts = (config, config.get("text_config"), config.get("vision_config"))
    if any(isinstance(part, dict) and "auto_map" in part for part in parts):
        raise UserError(
            f"{file}: 'auto_map' asks for code in the checkpoint, which is never run; if model_type alone describes the "
            "model, remove that key"
        )


def _hf_config(model_type: str, config: dict[str, Any], file: str) -> Any:
    """transformers' configuration object, with its defaults and its own checks."""
    from transformers import CONFIG_MAPPING  # imported here: it takes seconds, and the default never needs it

    try:
        return CONFIG_MAPPING[model_type](**{k: v for k, v in config.items() if k != "model_type"})
    except Exception as error:  # transformers raises different errors for different keys
        reason = " ".join((str(error.__cause__ or error).strip() or repr(error)).split())
        raise UserError(f"{file} is not a valid configuration of a {model_type} model: {reason[:300]}") from error


def _known(value: Any, table: dict[str, str], file: str, what: str) -> str:
    if not isinstance(value, str) or value not in table:
        raise UserError(f"{file}: {what} {value!r} is not supported; supported are {', '.join(table)}")
    return table[value]


def _positive(values: dict[str, Any], name: str, file: str, default: float | None = None) -> float:
    """A number above 0; `default` if it is missing."""
    value = default if values.get(name) is None else values[name]
    _need(checks.positive(value), file, f"{name}={value!r}; expected a positive number")
    return float(value)


def _colours(processor: dict[str, Any], name: str, default: tuple[float, ...], file: str) -> tuple[float, ...]:
    """Three numbers from the preprocessor_config.json beside `file`."""
    colours = processor.get(name) or default
    numbers = colours if isinstance(colours, (list, tuple)) else ()
    ok = len(numbers) == 3 and all(type(v) in (int, float) and abs(v) < 1e9 for v in numbers)
    _need(
        ok, os.path.join(os.path.dirname(file), "preprocessor_config.json"), f"{name}={colours!r}; expected 3 numbers"
    )
    return tuple(map(float, colours))


def _need(ok: bool, file: str, sentence: str) -> None:
    if not ok:
        raise UserError(f"{file}: {sentence}")
