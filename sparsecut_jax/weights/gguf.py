"""Reads GGUF, llama.cpp's file format: an LLM of the Llama family, quantised or not.

The `gguf` package reads headers and dequantises. This file adds Hugging Face names, undoes llama.cpp's permutation of
rows, and makes a config.json. gguf_tokenizer.py reads the tokenizer from the same header.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf.quants import dequantize

from sparsecut_jax.types import UserError
from sparsecut_jax.weights.tensors import Tensor, decimal

UNQUANTISED = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
CHUNK = 256  # rows dequantised at a time, which bounds the extra memory for a large embedding
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata with which, if not 0, llama.cpp computes something else than a plain Llama.
FOREIGN = ("expert_count", "attention.sliding_window", "attention.scale", "logit_scale", "residual_scale")


@dataclass(frozen=True)
class Header:
    """The header of a file: metadata, and (name, type, shape, offset, bytes) of every tensor."""

    file: str
    fields: dict[str, Any]
    tensors: tuple[tuple[str, Any, tuple[int, ...], int, int], ...]

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A metadata value. Raises UserError if it is of another type, or missing without a `default`."""
        if key not in self.fields and default is not ...:
            return default
        value = self.fields.get(key)
        if type(value) is not kind:
            got = "nothing" if value is None else type(value).__name__
            raise UserError(f"{self.file}: metadata {key}: expected {kind.__name__}, got {got}")
        return value


def open_gguf(path: str) -> dict[str, Tensor]:
    """The LLM's tensors by Hugging Face name, in torch's layout (out, in), dequantised when read.

    A quantised tensor reads as float32. A tensor that a plain Llama does not have keeps its name in the file.

    Raises:
      UserError: not a GGUF file, a truncated one, not a plain Llama, or a type that the gguf package cannot dequantise.
    """
    header, config = read_header(path), gguf_config(path)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, kind, shape, offset, size in header.tensors:
        if len(shape) not in (1, 2) or 0 in shape or len(shape) == 1 and kind.name not in UNQUANTISED:
            raise UserError(f"{path}: tensor {name} of type {kind.name} has shape {shape}; expected a matrix")
        _check_dequantises(path, name, kind)
        part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        layer, stem = part.groups() if part else (None, None)
        hf, rows = name, np.arange(shape[0])
        if layer is None and stem in NAMES:
            hf = f"{NAMES[stem]}.weight"
        elif layer is not None and stem in LAYER_NAMES:
            hf = f"model.layers.{layer}.{LAYER_NAMES[stem]}.weight"
            if stem in heads:
                if shape[0] != heads[stem] * config["head_dim"]:
                    expected = f"{heads[stem]} heads of {config['head_dim']}"
                    raise UserError(f"{path}: tensor {name} has {shape[0]} rows; expected {expected}")
                rows = _interleaved(shape[0], heads[stem])
        read = functools.partial(_read, path, kind, shape, offset, size // shape[0], rows)
        tensors[hf] = Tensor(path, name, shape, kind.name if kind.name in UNQUANTISED else "F32", read)
    return tensors


def gguf_config(path: str) -> dict[str, Any]:
    """The config.json of this LLM, with model_type "llama".

    Raises:
      UserError: not a GGUF file, another architecture, or a feature that a plain Llama does not have.
    """
    header = read_header(path)
    architecture = header.get("general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{path}: expected the architecture llama, got {architecture!r}")
    get = lambda key, *args: header.get(f"llama.{key}", *args)
    for key in FOREIGN:
        if header.fields.get(f"llama.{key}"):
            raise UserError(f"{path}: llama.{key} is {header.fields[f'llama.{key}']!r}, which is not supported")
    shapes = {name: shape for name, _, shape, _, _ in header.tensors}
    if "rope_freqs.weight" in shapes:
        raise UserError(
            f"{path}: tensor rope_freqs.weight holds pre-scaled rotary frequencies (as in Llama 3.1), which is not "
            "supported; use the safetensors of this model"
        )
    if "token_embd.weight" not in shapes:
        raise UserError(f"{path} has no tensor token_embd.weight")
    heads, width = get("attention.head_count", int), get("embedding_length", int)
    if heads < 1:
        raise UserError(f"{path}: llama.attention.head_count is {heads}; expected at least 1")
    head_dim = get("attention.key_length", int, width // heads)
    if head_dim < 2 or head_dim % 2:
        raise UserError(
            f"{path}: heads are {head_dim} wide; expected an even width, because rotary embeddings need pairs"
        )
    for key in ("rope.dimension_count", "attention.value_length"):
        if get(key, int, head_dim) != head_dim:
            raise UserError(f"{path}: llama.{key} is {get(key, int)}; expected the width of a head, {head_dim}")
    return {
        "model_type": "llama",
        "vocab_size": shapes["token_embd.weight"][0],  # llama.vocab_size may be missing or wrong
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": decimal(get("attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": _rope(header),
        "max_position_embeddings": get("context_length", int),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": header.get("tokenizer.ggml.eos_token_id", int, None),
        "pad_token_id": header.get("tokenizer.ggml.padding_token_id", int, None),
    }


def read_header(path: str) -> Header:
    """The header of the file at `path`. Raises UserError if it is not a complete GGUF file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    stat = os.stat(path)
    return _parse(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)  # a vocabulary takes seconds to read, and tensors, config and tokenizer all need it
def _parse(path: str, changed: int, size: int) -> Header:
    """Copies everything out of the reader, because a view that outlives it would keep the whole file mapped."""
    try:
        reader = GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("it has the byte order of another machine")
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = tuple(
            (t.name, t.tensor_type, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
            for t in reader.tensors
        )
    except Exception as error:  # gguf raises different errors depending on where the file ends
        raise UserError(f"{path} is not a complete GGUF file: {error}") from error
    return Header(path, fields, tensors)


def _interleaved(rows: int, heads: int) -> np.ndarray:
    """int[rows]: index in the file of each row of Hugging Face's q or k.

    Rotary embeddings rotate pairs of a head's elements. Hugging Face pairs element i with i + H/2, llama.cpp pairs 2i with
    2i + 1 and therefore stores the rows of both halves alternately.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _check_dequantises(path: str, name: str, kind: Any) -> None:
    try:
        if kind.name not in UNQUANTISED:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise UserError(f"{path}: tensor {name} has type {kind.name}, which the gguf package cannot read") from error


def _read(
    path: str, kind: Any, shape: tuple[int, ...], offset: int, stride: int, order: np.ndarray, index: tuple[slice, ...]
) -> np.ndarray:
    """tensor[index], reading only the rows it needs: quantised blocks run along the last axis.

    Args:
      offset, stride: bytes before the first row, and bytes per row. A vector has rows of one element.
      order: int[rows], index in the file of each row.
    """
    dtype = UNQUANTISED.get(kind.name)
    rows, columns = order[index[0]], index[1] if len(shape) == 2 else slice(None)
    result = np.empty((len(rows), len(range(*columns.indices((*shape, 1)[1])))), dtype or np.float32)
    with open(path, "rb") as file:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            first = part.min()
            file.seek(offset + first * stride)
            raw = np.fromfile(file, np.uint8, (part.max() + 1 - first) * stride).reshape(-1, stride)
            values = raw.view(dtype) if dtype else dequantize(raw, kind)
            result[start : start + CHUNK] = values[part - first][:, columns]
    return result if len(shape) == 2 else result[:, 0]


def _rope(header: Header) -> dict[str, Any]:
    """`rope_parameters` for config.json."""
    theta = {"rope_theta": decimal(header.get("llama.rope.freq_base", float, 10000.0))}
    kind = header.get("llama.rope.scaling.type", str, "linear")
    old = header.get("llama.rope.scale_linear", float, 1.0)  # its name in early files
    factor = decimal(header.get("llama.rope.scaling.factor", float, old))
    if kind not in ("none", "linear"):
        raise UserError(f"{header.file}: llama.rope.scaling.type is {kind!r}; expected none or linear")
    if kind == "none" or factor in (0, 1):
        return {"rope_type": "default", **theta}
    return {"rope_type": "linear", "factor": factor, **theta}
