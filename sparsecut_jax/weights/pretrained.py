"""Where pretrained parts come from: folders, files and hub ids, and what their config.json says of the settings."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from sparsecut_jax import checks
from sparsecut_jax import config as config_lib
from sparsecut_jax.data import tokenizer as tokenizer_lib
from sparsecut_jax.data.tokenizer import Tokenizer
from sparsecut_jax.settings import Config, InitConfig
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import gguf, onnx
from sparsecut_jax.weights.architecture import llm_settings, refuse_remote_code, vision_settings
from sparsecut_jax.weights.gguf_tokenizer import gguf_tokenizer
from sparsecut_jax.weights.names import canonical
from sparsecut_jax.weights.tensors import Tensor, open_safetensors, read_json

PARTS = ("vision", "fusion", "llm")
OFFICIAL_FUSIONS = {"cross_mlp": "channel", "cross_attention": "cross_attention", "mlp2x_gelu": "mlp"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """Files that hold one part or several.

    Attributes:
      path: a folder or a file.
      config, file: its config.json and where that stands; {} for a bare projector.
      processor: its preprocessor_config.json, or {}.
      tensors: {part: {canonical name: Tensor}}; what belongs to no part is under None.
    """

    path: str
    config: dict[str, Any]
    file: str
    processor: dict[str, Any]
    tensors: dict[str | None, dict[str, Tensor]]

    @property
    def folder(self) -> str:
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or "."


def open_sources(init: InitConfig) -> dict[str, Source]:
    """{part: its source}, for the parts that have one. Nothing but headers is read.

    Raises:
      UserError: a source is not there, cannot be read, or holds nothing of its part.
    """
    if init.model:
        extra = [f"config.init.{part}" for part in PARTS if getattr(init, part)]
        if extra:
            raise UserError(f"config.init.model is a whole model; {extra[0]} beside it would have no effect")
        source = _open(init.model, "model", needs_config=True)
        found = dict.fromkeys(PARTS, source)
    else:
        found = {p: _open(getattr(init, p), p, p != "fusion") for p in PARTS if getattr(init, p)}
    for part, source in found.items():
        if not source.tensors.get(part):
            raise UserError(f"{source.path} holds no tensors of the {part}; expected names as Hugging Face has them")
    return found


def resolve(cfg: Config, sources: dict[str, Source]) -> Config:
    """The config with the sizes that the sources' config.json say.

    Raises:
      UserError: an architecture that is not supported, or settings that do not go with it.
    """
    init, whole = cfg.init, cfg.init.model
    raw = dataclasses.asdict(cfg)
    if "vision" in sources:
        source = sources["vision"]
        raw["vision"] |= vision_settings(source.config, source.file, source.processor)
        if init.image_size and raw["vision"]["family"] == "siglip2":
            raise UserError(
                f"{source.file}: config.init.image_size is not supported for siglip2 towers of any resolution"
            )
        raw["vision"]["image_size"] = init.image_size or raw["vision"]["image_size"]
    if "llm" in sources:
        raw["llm"] |= llm_settings(sources["llm"].config, sources["llm"].file)
    if "fusion" in sources and not whole:
        for group, values in official_settings(sources["fusion"].config, sources["fusion"].file).items():
            raw[group] |= values
    if whole:
        source = sources["llm"]
        for group, values in whole_settings(source.config, source.file, raw["vision"]["class_token"]).items():
            raw[group] |= values
    resolved = config_lib.check(raw)
    checks.check_rope(resolved)
    return resolved


def resolve_here(cfg: Config) -> tuple[Config, list[str], list[str]]:
    """`resolve` with the sources that are on this machine, and the paths of those that are and are not.

    Nothing is downloaded, and of files only headers are read.
    """
    paths = {part: getattr(cfg.init, part) for part in ("model", *PARTS)}
    here = {part: path if os.path.exists(path) else "" for part, path in paths.items()}
    init = dataclasses.replace(cfg.init, **here)
    resolved = resolve(dataclasses.replace(cfg, init=init), open_sources(init))
    away = [path for part, path in paths.items() if path and not here[part]]
    return dataclasses.replace(resolved, init=cfg.init), [path for path in here.values() if path], away


def official_settings(config: dict[str, Any], file: str) -> dict[str, dict[str, Any]]:
    """What the config.json beside an official projector says of fusion, main feature and shortcuts; {} if nothing."""
    found: dict[str, dict[str, Any]] = {}
    if "mm_projector_type" in config:
        kind = config["mm_projector_type"]
        if not isinstance(kind, str) or kind not in OFFICIAL_FUSIONS:
            known = ", ".join(OFFICIAL_FUSIONS)
            raise UserError(f"{file}: mm_projector_type {kind!r} is not supported; supported are {known}")
        found["fusion"] = {"name": OFFICIAL_FUSIONS[kind]}
    if "mm_vision_select_layer" in config:
        found["vision"] = {"select_layer": config["mm_vision_select_layer"]}
    if "vit_levels" in config and "llm_layers" in config:
        levels, layers = config["vit_levels"], config["llm_layers"]
        if not isinstance(levels, list) or not isinstance(layers, list):
            raise UserError(f"{file}: expected lists vit_levels and llm_layers, got {levels!r} and {layers!r}")
        found["shortcuts"] = {
            "density": "explicit" if levels else "none",
            "vit_levels": levels,
            "llm_layers": layers,
            "feature_order_reverse": config.get("feature_order_reverse", False),
        }
    return found


def whole_settings(config: dict[str, Any], file: str, class_token: bool) -> dict[str, dict[str, Any]]:
    """Fusion and shortcuts of a whole model: LLaVA's are `mlp` and none, ours stand in its config.json.

    class_token: whether the tower has one; it is never shown to the LLM, and no other token is left out.
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
            "fusion": {"name": "mlp", "shared": True},
            "shortcuts": none,
            "vision": {"select_layer": select},
        }
    if kind != "sparsecut":
        raise UserError(
            f"{file}: model_type {kind!r} is no whole model of LLaVA's layout; give its parts as config.init.vision, "
            ".llm and .fusion"
        )
    try:
        fusion, shortcuts = config["fusion"], config["shortcuts"]
        levels, layers = tuple(shortcuts["vit_levels"]), tuple(shortcuts["llm_layers"])
        return {
            "fusion": {"name": fusion["name"], "shared": fusion["shared"], "grid": fusion.get("grid", (2, 2))},
            "shortcuts": {
                "density": "explicit" if levels else "none",
                "vit_levels": levels,
                "llm_layers": layers,
                "position": shortcuts["position"],
                "feature_order_reverse": False,
            },
            "vision": {"select_layer": select},
            "data": {"image_fit": config["image_fit"]},
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: 'fusion' or 'shortcuts' is not as convert to-hf writes it: {error!r}") from error


def source_tokenizer(cfg: Config, sources: dict[str, Source]) -> Tokenizer | None:
    """The tokenizer of config.tokenizer.path, or the one that came with the LLM; None if there is neither."""
    if cfg.tokenizer.path:
        return tokenizer_lib.load(cfg.tokenizer.path)
    if "llm" not in sources:
        return None
    source = sources["llm"]
    if source.path.endswith(".gguf"):
        return gguf_tokenizer(source.path)
    if any(os.path.exists(os.path.join(source.folder, name)) for name in TOKENIZER_FILES):
        return tokenizer_lib.load(source.folder)
    return None


def _open(path: str, part: str, needs_config: bool) -> Source:
    path = _local(path, part)
    if path.endswith(".gguf"):
        if part != "llm":
            raise UserError(f"config.init.{part}={path!r}: a GGUF file can only be the LLM")
        return _sorted(path, gguf.gguf_config(path), path, gguf.open_gguf(path))
    if path.endswith(".onnx"):
        if part != "vision":
            raise UserError(f"config.init.{part}={path!r}: an ONNX file can only be the vision tower")
        return _sorted(path, onnx.onnx_config(path), path, onnx.open_onnx(path))
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    file = os.path.join(folder, "config.json")
    config = read_json(file) if needs_config or os.path.exists(file) else {}
    refuse_remote_code(config, file)
    processor = os.path.join(folder, "preprocessor_config.json")
    return _sorted(
        path, config, file, open_safetensors(path), read_json(processor) if os.path.exists(processor) else {}
    )


def _sorted(
    path: str, config: dict, file: str, tensors: dict[str, Tensor], processor: dict[str, Any] | None = None
) -> Source:
    parts: dict[str | None, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, short = canonical(name)
        clash = parts.setdefault(part, {}).get(short)
        if clash is not None:
            raise UserError(f"{tensor.file}: tensors {clash.name} and {name} are both {short}")
        parts[part][short] = tensor
    return Source(path, config, file, processor or {}, parts)


def _local(path: str, part: str) -> str:
    """A path as it is, a hub id as the folder it was fetched to."""
    if os.path.exists(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"config.init.{part}={path!r} is not there; expected a folder, a file or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"])
    except Exception as error:  # no network, no such id, no permission: each is its own kind
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"config.init.{part}={path!r} is neither here nor could it be fetched as a hub id: {reason}"
        ) from error
