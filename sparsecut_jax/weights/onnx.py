"""Reads ONNX: the vision tower of a model exported by PyTorch, if it has the structure of Hugging Face's Dinov2Model.

An export keeps the names of most parameters, but not of those it changes: linear weights are transposed, and the table of
position embeddings is split into class token and grid. These are identified by the nodes that read them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from sparsecut_jax.types import UserError
from sparsecut_jax.weights.tensors import Tensor, decimal

DTYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}  # TensorProto.DataType
PROJECTION = "embeddings.patch_embeddings.projection.weight"
POSITIONS = "embeddings.position_embeddings"
# torch's `interpolate(mode="bicubic", align_corners=False)` as ONNX attributes; weights/resize.py computes the same.
RESIZE = {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75}
ToArray = Callable[[Any], np.ndarray]


def open_onnx(path: str) -> dict[str, Tensor]:
    """The tower's tensors by Hugging Face name, in torch's layout (out, in); all others by their name in the file.

    The position embeddings are those of the grid the tower was trained with, (1, 1 + N, C), not the resized ones.

    Raises:
      UserError: not an ONNX file, or it has no tower of this structure.
    """
    return _parsed(path, tower_tensors)


def onnx_config(path: str) -> dict[str, Any]:
    """The config.json of this tower, with model_type "dinov2".

    Raises:
      UserError: not an ONNX file, or it has no tower of this structure.
    """
    return _parsed(path, tower_config)


def tower_tensors(path: str, graph: Any, to_array: ToArray) -> dict[str, Tensor]:
    """`open_onnx` for a GraphProto. `to_array` converts a TensorProto to an array."""
    prefix = _prefix(path, graph)
    stored = {t.name: t for t in graph.initializer}
    tensors = {name.removeprefix(prefix): _tensor(path, name, t, to_array) for name, t in stored.items()}
    for node in graph.node:
        weight = node.input[1] if node.op_type == "MatMul" else None
        module = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
        if weight in stored and module.startswith(prefix):
            tensors.pop(weight, None)  # equal tensors are stored once and may be read by several nodes
            name = f"{module}.weight"
            tensors[name.removeprefix(prefix)] = _tensor(path, name, stored[weight], to_array, transposed=True)
    if POSITIONS not in tensors:
        parts = _positions(path, graph, stored, prefix)
        for part in parts:
            del tensors[part.name]
        shape = (1, sum(part.dims[1] for part in parts), parts[0].dims[2])
        join = lambda index: np.concatenate([to_array(part) for part in parts], axis=1)[index]
        tensors[POSITIONS] = Tensor(path, prefix + POSITIONS, shape, _dtype(parts[0]), join)
    return tensors


def tower_config(path: str, graph: Any, to_array: ToArray) -> dict[str, Any]:
    """`onnx_config` for a GraphProto. `to_array` converts a TensorProto to an array."""
    tensors = tower_tensors(path, graph, to_array)
    block = f"{_scope(_prefix(path, graph))}encoder/layer.0/"
    constants = {
        node.output[0]: to_array(attribute.t)
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    }
    for name in ("encoder.layer.0.mlp.fc1.bias", "encoder.layer.0.attention.attention.query.bias"):
        if name not in tensors:
            raise UserError(f"{path}: the tower has no tensor {name}")
    width, _, patch, _ = tensors[PROJECTION].shape
    ratio = tensors["encoder.layer.0.mlp.fc1.bias"].shape[0] / width
    side = math.isqrt(tensors[POSITIONS].shape[1] - 1)
    if side**2 + 1 != tensors[POSITIONS].shape[1]:
        raise UserError(f"{path}: {POSITIONS} has {tensors[POSITIONS].shape[1]} rows; expected 1 + a square")
    if not any(n.op_type == "Erf" and n.name.startswith(f"{block}mlp/") for n in graph.node):
        raise UserError(f"{path}: the MLPs of the tower have no Erf node; expected exact GELU as activation")
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len({n.split(".")[2] for n in tensors if re.match(r"encoder\.layer\.\d+\.", n)}),
        "num_attention_heads": _heads(path, graph, constants, f"{block}attention/", width),
        "image_size": side * patch,
        "patch_size": patch,
        "mlp_ratio": ratio if ratio % 1 else int(ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": _epsilon(path, graph, constants, f"{block}norm1/"),
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }


def _parsed(path: str, parse: Callable[[str, Any, ToArray], dict]) -> dict:
    """`parse` applied to the graph in the file. Raises UserError if its nodes or tensors are damaged."""
    try:
        return parse(path, *_load(path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the graph of the tower cannot be read: {error!r}") from error


def _load(path: str) -> tuple[Any, ToArray]:
    """(graph, function that converts one of its tensors to an array)."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    try:
        import onnx  # optional: few towers come as ONNX
        from onnx import numpy_helper
    except ImportError as error:
        raise UserError(f'{path} needs the package onnx: pip install onnx (the extra "onnx")') from error

    def to_array(tensor: Any) -> np.ndarray:
        try:
            return numpy_helper.to_array(tensor)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: tensor {tensor.name} cannot be read: {error}") from error

    try:
        return onnx.load(path).graph, to_array
    except Exception as error:  # from protobuf, or from onnx if tensors are in separate files
        raise UserError(f"{path} is not a complete ONNX file: {error}") from error


def _prefix(path: str, graph: Any) -> str:
    """The prefix of the tower's parameter names, such as "backbone."."""
    prefixes = [t.name.removesuffix(PROJECTION) for t in graph.initializer if t.name.endswith(PROJECTION)]
    if len(prefixes) != 1:
        raise UserError(f"{path} has {len(prefixes)} tensors named {PROJECTION}; expected one vision tower")
    return prefixes[0]


def _scope(prefix: str) -> str:
    """The prefix of the tower's node names, such as "/backbone/"."""
    return "/" + prefix.replace(".", "/")


def _dtype(tensor: Any) -> str:
    return DTYPES.get(tensor.data_type, f"ONNX type {tensor.data_type}")


def _tensor(path: str, name: str, tensor: Any, to_array: ToArray, transposed: bool = False) -> Tensor:
    shape = tuple(reversed(tensor.dims)) if transposed else tuple(tensor.dims)
    read = lambda index: (to_array(tensor).T if transposed else to_array(tensor))[index]
    return Tensor(path, name, shape, _dtype(tensor), read)


def _positions(path: str, graph: Any, stored: dict[str, Any], prefix: str) -> list[Any]:
    """The parts (1, 1, C) and (1, N, C) of the position embeddings, class token first.

    The export stores slices of the table under other names; they are found through the embedding nodes that read them.
    """
    nodes = [node for node in graph.node if node.name.startswith(f"{_scope(prefix)}embeddings/")]
    for node in nodes:
        given = {a.name: a.s.decode() or a.f for a in node.attribute if a.name in RESIZE}
        if node.op_type == "Resize" and given != RESIZE:
            raise UserError(f"{path}: node {node.name} resizes position embeddings by {given}; expected {RESIZE}")
    names = {name for node in nodes for name in node.input if name in stored}
    parts = [stored[name] for name in names if not name.startswith(f"{prefix}embeddings.")]
    parts = sorted((part for part in parts if len(part.dims) == 3), key=lambda part: part.dims[1])
    shapes = [tuple(part.dims) for part in parts]
    if len(shapes) != 2 or shapes[0] != (1, 1, shapes[1][2]) or shapes[1][0] != 1:
        raise UserError(f"{path}: expected position embeddings (1, 1, C) and (1, N, C), got {shapes}")
    return parts


def _heads(path: str, graph: Any, constants: dict[str, np.ndarray], scope: str, width: int) -> int:
    """The number of heads, from the reshape to (batch, tokens, heads, head width), whose last two sizes are constants."""
    for node in graph.node:
        if node.op_type == "Concat" and node.name.startswith(scope) and len(node.input) == 4:
            heads, size = (constants.get(name) for name in node.input[2:])
            if heads is not None and size is not None and int(heads.item()) * int(size.item()) == width:
                return int(heads.item())
    raise UserError(f"{path}: no node below {scope} splits the width of {width} into heads")


def _epsilon(path: str, graph: Any, constants: dict[str, np.ndarray], scope: str) -> float:
    """The epsilon of a LayerNormalization node, or of the Add that implements it before opset 17."""
    for node in graph.node:
        if node.op_type == "LayerNormalization" and node.name.startswith(scope):
            return decimal(next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5))
        if node.op_type == "Add" and node.name.startswith(scope):
            for name in node.input:
                if name in constants:
                    return decimal(constants[name].item())
    raise UserError(f"{path}: no node below {scope} adds an epsilon to the variance")
