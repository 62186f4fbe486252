"""Where pretrained parts come from: folders, files and hub ids, opened but not yet read."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from sparsecut_jax.settings import Config, InitConfig
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import gguf, onnx
from sparsecut_jax.weights.architecture import refuse_remote_code
from sparsecut_jax.weights.families import TASK, part_and_name
from sparsecut_jax.weights.gguf_tokenizer import gguf_tokenizer
from sparsecut_jax.weights.tensors import Tensor, open_safetensors, read_json

PARTS = ("vision", "fusion", "llm")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Files that hold one or several parts.

    Attributes:
      path: a folder or a file.
      config, file: its config.json and the path of that file; {} for a bare projector.
      processor: its preprocessor_config.json, or {}.
      tensors: {part: {short name: Tensor}}; tensors of no part are under None.
    """

    path: str
    config: dict[str, Any]
    file: str
    processor: dict[str, Any]
    tensors: dict[str | None, dict[str, Tensor]]

    @property
    def folder(self) -> str:
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or "."


def open_sources(init: InitConfig) -> dict[str, WeightSource]:
    """{part: its source}, for the parts that have one. Only headers are read.

    Raises:
      UserError: a source does not exist, cannot be read, or has no tensors of its part.
    """
    if init.model:
        extra = [f"config.init.{part}" for part in PARTS if getattr(init, part)]
        if extra:
            raise UserError(f"config.init.model is a whole model, so {extra[0]} has no effect; leave one of them out")
        source = _open(init.model, "model", needs_config=True)
        sources = dict.fromkeys((*PARTS, TASK) if TASK in source.tensors else PARTS, source)
    else:
        sources = {p: _open(getattr(init, p), p, p != "fusion") for p in PARTS if getattr(init, p)}
    for part, source in sources.items():
        if not source.tensors.get(part):
            raise UserError(f"{source.path} has no tensors of the {part}; expected Hugging Face's names")
    return sources


def source_tokenizer(cfg: Config, sources: dict[str, WeightSource]) -> Tokenizer | None:
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


def _open(path: str, part: str, needs_config: bool) -> WeightSource:
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
) -> WeightSource:
    parts: dict[str | None, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, short = part_and_name(name)
        clash = parts.setdefault(part, {}).get(short)
        if clash is not None:
            raise UserError(f"{tensor.file}: tensors {clash.name} and {name} are both {short}; remove one of them")
        parts[part][short] = tensor
    return WeightSource(path, config, file, processor or {}, parts)


def _local(path: str, part: str) -> str:
    """The path itself; for a hub id, the folder it was downloaded to."""
    if os.path.isdir(os.path.join(path, "checkpoints")):
        raise UserError(
            f"config.init.{part}={path!r} is a run; start from it with --config.init_from={path}, or export it first: "
            f"python -m sparsecut_jax.convert to-hf --workdir={path} --out=exported"
        )
    if os.path.exists(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"config.init.{part}={path!r} does not exist; expected a folder, a file or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"])
    except Exception as error:  # no network, no such id and no permission raise different errors
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"config.init.{part}={path!r} is not a local path and could not be downloaded as a hub id: {reason}"
        ) from error
