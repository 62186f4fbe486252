"""Hugging Face names -> our parameter paths, as tables of regex -> (path, how to lay the tensor out).

Torch keeps a linear weight as (out, in); here kernels are (in, out), attention kernels have separate
head axes, and the layers of a stack share one array with a leading layer axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util

from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

Layout = Callable[[np.ndarray, Config], np.ndarray]


def _same(w: np.ndarray, cfg: Config) -> np.ndarray:
    return w


def _transposed(w: np.ndarray, cfg: Config) -> np.ndarray:
    return w.T


def _patches(w: np.ndarray, cfg: Config) -> np.ndarray:
    """conv (C, 3, p, p) -> (p * p * 3, C)."""
    return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])


def _vit_in(w: np.ndarray, cfg: Config) -> np.ndarray:
    """(Q*H, C) -> (C, Q, H)."""
    return w.T.reshape(w.shape[1], cfg.vision.heads, -1)


def _vit_in_bias(w: np.ndarray, cfg: Config) -> np.ndarray:
    return w.reshape(cfg.vision.heads, -1)


def _vit_out(w: np.ndarray, cfg: Config) -> np.ndarray:
    """(C, Q*H) -> (Q, H, C)."""
    return w.T.reshape(cfg.vision.heads, -1, w.shape[0])


def _llm_in(w: np.ndarray, cfg: Config) -> np.ndarray:
    return w.T.reshape(w.shape[1], -1, cfg.llm.head_dim)


def _llm_out(w: np.ndarray, cfg: Config) -> np.ndarray:
    return w.T.reshape(-1, cfg.llm.head_dim, w.shape[0])


def _fusion_heads(cfg: Config) -> int:
    return max(1, cfg.vision.width // 64)


def _fusion_in(part: int) -> Layout:
    """Rows q, k, v of PyTorch's packed in_proj, (3C, C) -> (C, Q, H)."""
    return lambda w, cfg: np.split(w, 3)[part].T.reshape(w.shape[1], _fusion_heads(cfg), -1)


def _fusion_in_bias(part: int) -> Layout:
    return lambda w, cfg: np.split(w, 3)[part].reshape(_fusion_heads(cfg), -1)


def _fusion_out(w: np.ndarray, cfg: Config) -> np.ndarray:
    return w.T.reshape(_fusion_heads(cfg), -1, w.shape[0])


# Path parts: "{layer}" is the layer index of a stack. A name may feed several parameters (packed in_proj).
CLIP = [
    (r"embeddings\.class_embedding", "vision/class_embedding", _same),
    (r"embeddings\.patch_embedding\.weight", "vision/patch_embedding/kernel", _patches),
    (r"embeddings\.position_embedding\.weight", "vision/position_embedding", _same),
    (r"pre_layrnorm\.weight", "vision/pre_norm/scale", _same),
    (r"pre_layrnorm\.bias", "vision/pre_norm/bias", _same),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.weight", "vision/blocks/norm{1}/scale", _same),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.bias", "vision/blocks/norm{1}/bias", _same),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", "vision/blocks/attention/{1}_kernel", _vit_in),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.bias", "vision/blocks/attention/{1}_bias", _vit_in_bias),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.weight", "vision/blocks/attention/out_kernel", _vit_out),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.bias", "vision/blocks/attention/out_bias", _same),
    (r"encoder\.layers\.(\d+)\.mlp\.fc([12])\.weight", "vision/blocks/fc{1}/kernel", _transposed),
    (r"encoder\.layers\.(\d+)\.mlp\.fc([12])\.bias", "vision/blocks/fc{1}/bias", _same),
]
LLAMA = [
    (r"model\.embed_tokens\.weight", "llm/embedding", _same),
    (r"model\.norm\.weight", "llm/norm/scale", _same),
    (r"lm_head\.weight", "llm/head", _transposed),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", "llm/layers/norm1/scale", _same),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", "llm/layers/norm2/scale", _same),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", "llm/layers/attention/{1}", _llm_in),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", "llm/layers/attention/out", _llm_out),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", "llm/layers/mlp/{1}/kernel", _transposed),
]
_FUSE, _OFFICIAL = "fusion/fuse", r"(?:model\.)?mm_projector\."
PROJECTOR = [
    (_OFFICIAL + r"(?:mlp\.)?0\.weight", f"{_FUSE}/projector/fc1/kernel", _transposed),
    (_OFFICIAL + r"(?:mlp\.)?0\.bias", f"{_FUSE}/projector/fc1/bias", _same),
    (_OFFICIAL + r"(?:mlp\.)?2\.weight", f"{_FUSE}/projector/fc2/kernel", _transposed),
    (_OFFICIAL + r"(?:mlp\.)?2\.bias", f"{_FUSE}/projector/fc2/bias", _same),
    *(
        (_OFFICIAL + r"attn\.in_proj_weight", f"{_FUSE}/attention/{n}_kernel", _fusion_in(i))
        for i, n in enumerate("qkv")
    ),
    *(
        (_OFFICIAL + r"attn\.in_proj_bias", f"{_FUSE}/attention/{n}_bias", _fusion_in_bias(i))
        for i, n in enumerate("qkv")
    ),
    (_OFFICIAL + r"attn\.out_proj\.weight", f"{_FUSE}/attention/out_kernel", _fusion_out),
    (_OFFICIAL + r"attn\.out_proj\.bias", f"{_FUSE}/attention/out_bias", _same),
    (_OFFICIAL + r"norm([12])\.weight", _FUSE + "/norm{0}/scale", _same),
    (_OFFICIAL + r"norm([12])\.bias", _FUSE + "/norm{0}/bias", _same),
    (_OFFICIAL + r"ffn\.0\.weight", f"{_FUSE}/ffn1/kernel", _transposed),
    (_OFFICIAL + r"ffn\.0\.bias", f"{_FUSE}/ffn1/bias", _same),
    (_OFFICIAL + r"ffn\.2\.weight", f"{_FUSE}/ffn2/kernel", _transposed),
    (_OFFICIAL + r"ffn\.2\.bias", f"{_FUSE}/ffn2/bias", _same),
]
TABLE = [(re.compile(r"(?:vision_model\.)?" + name), path, layout) for name, path, layout in CLIP]
TABLE += [(re.compile(name), path, layout) for name, path, layout in (*LLAMA, *PROJECTOR)]


def targets(name: str) -> list[tuple[str, int | None, Layout]]:
    """Where the tensor of that Hugging Face name goes: (path, layer of a stack or None, layout)."""
    found = []
    for pattern, path, layout in TABLE:
        if match := pattern.fullmatch(name):
            stacked = "layers" in path or "blocks" in path
            found.append((path.format(*match.groups()), int(match[1]) if stacked else None, layout))
    return found


def assemble(tensors: dict[str, np.ndarray], template: Any, cfg: Config) -> tuple[dict, list[str]]:
    """Hugging Face tensors -> a parameter tree like `template` (shapes are enough), and the names left unused.

    Raises:
      UserError: a parameter that no tensor fills, or a shape that differs.
    """
    wanted = traverse_util.flatten_dict(template, sep="/")
    filled: dict[str, Any] = {}
    unused = []
    for name, tensor in tensors.items():
        used = False
        for path, layer, layout in targets(name):
            if path not in wanted or (layer is not None and layer >= wanted[path].shape[0]):
                continue
            value = layout(tensor, cfg)
            expected = wanted[path].shape if layer is None else wanted[path].shape[1:]
            if value.shape != tuple(expected):
                raise UserError(f"tensor {name} has shape {value.shape} as {path}; expected {tuple(expected)}")
            used = True
            if layer is None:
                filled[path] = value
            else:
                filled.setdefault(path, {})[layer] = value
        if not used:
            unused.append(name)
    for path, leaf in wanted.items():
        layers = filled.get(path)
        if layers is None or (isinstance(layers, dict) and len(layers) != leaf.shape[0]):
            raise UserError(f"no tensor for the whole of {path}{tuple(leaf.shape)}")
        if isinstance(layers, dict):
            filled[path] = np.stack([layers[i] for i in range(leaf.shape[0])])
    return traverse_util.unflatten_dict(filled, sep="/"), unused
