"""Tensors in files, by Hugging Face name, read lazily and slice by slice.

A checkpoint is a dict {name: Tensor}. `open_safetensors` reads one from a folder or a file; gguf.py and onnx.py do the
same for their formats. Pickles are refused, because loading one can run any code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sparsecut_jax.types import UserError

INDEX = "model.safetensors.index.json"
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet.

    Attributes:
      file, name: its location, for messages.
      shape: its shape in torch's layout.
      dtype: its dtype as safetensors names it: "F32", "BF16", ...
      slices: reads `tensor[index]`, one slice per axis; use `read`, which also checks the values.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: Callable[[tuple[slice, ...]], np.ndarray]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor or a part of it, in its own dtype.

        Raises:
          UserError: its dtype is not floating-point, or a value is NaN or infinite.
        """
        self.check()
        index = tuple(slice(None) for _ in self.shape) if index is None else index
        value = self.slices(index)
        if not np.isfinite(value).all():
            raise UserError(f"{self.file}: tensor {self.name} has NaN or infinite values; get an intact copy")
        return value

    def check(self) -> None:
        """Raises UserError if the dtype is not floating-point."""
        if self.dtype not in FLOATS:
            raise UserError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype}; expected one of {', '.join(FLOATS)} "
                "(quantised weights are only read from GGUF)"
            )


def open_safetensors(path: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a folder with one such file or with several and their index.

    Raises:
      UserError: no such file, a pickle, a truncated file, or an inconsistent header or index.
    """
    if not os.path.isdir(path):
        return _open_file(path)
    index = os.path.join(path, INDEX)
    files = sorted(f for f in os.listdir(path) if f.endswith(".safetensors"))
    if os.path.exists(index):
        return _open_shards(path, index)
    if not files:
        pickles = sorted(f for f in os.listdir(path) if f.endswith(PICKLES))
        if pickles:
            refuse_pickle(os.path.join(path, pickles[0]))
        raise UserError(f"{path} has no .safetensors file; pickled weights (.bin) must be converted first")
    if "model.safetensors" in files:
        return _open_file(os.path.join(path, "model.safetensors"))
    if len(files) > 1:
        raise UserError(f"{path} has {len(files)} .safetensors files but no {INDEX}; add the index, or name one file")
    return _open_file(os.path.join(path, files[0]))


def refuse_pickle(file: str) -> None:
    """Raises UserError, which tells how to convert `file`."""
    raise UserError(
        f"{file} is a pickle, which can run any code when loaded, and is refused; if you trust it, convert it "
        "with torch: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
    )


def read_json(path: str) -> dict:
    """The object in a JSON file. Raises UserError if the file does not exist or holds no JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def decimal(value: float) -> float:
    """The shortest decimal number with the same float32 value, which is how the file stores it: 1e-05."""
    return float(str(np.float32(value)))


def _open_shards(folder: str, index: str) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index}: expected a 'weight_map' from tensor names to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise UserError(f"{index} names the file {file!r}; expected a file in the same folder")
        for name, tensor in _open_file(os.path.join(folder, file)).items():
            if name in tensors:
                raise UserError(f"{tensor.file}: tensor {name} is also in {tensors[name].file}")
            tensors[name] = tensor
    for name, file in where.items():
        if name not in tensors or os.path.basename(tensors[name].file) != file:
            raise UserError(f"{index} lists tensor {name} in {file}, which does not contain it")
    return tensors


def _open_file(file: str) -> dict[str, Tensor]:
    if not os.path.isfile(file):
        raise UserError(f"{file} does not exist")
    with open(file, "rb") as opened:
        start = opened.read(4)
    if file.endswith(PICKLES) or start[:2] == b"PK" or start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        refuse_pickle(file)
    try:
        with safe_open(file, "np") as opened:
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no dict
            return {
                name: Tensor(file, name, tuple(view.get_shape()), view.get_dtype(), _reader(file, name))
                for name, view in views.items()
            }
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from error


def _reader(file: str, name: str) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Reopens the file for every tensor: it is memory-mapped, and its pages count as used until it is closed."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        try:
            with safe_open(file, "np") as opened:
                return opened.get_slice(name)[index] if index else opened.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} is not a complete safetensors file: {error}") from error

    return read
