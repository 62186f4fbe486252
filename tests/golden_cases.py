"""The golden cases of tests/golden as a model, parameters and a batch. README.md there says what is in them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsecut_jax import config
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.runs.parameters import abstract_params, initial_params
from sparsecut_jax.runtime import sharding
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch, batch_spec, empty_batch
from sparsecut_jax.weights import load, pretrained
from sparsecut_jax.weights.claims import adopt

FOLDER = Path(__file__).parent / "golden"
CASES = ("a_cross_mlp_llama", "e_plain_llava_llama")
N = 16
FUSIONS = {"cross_mlp": "channel", "mlp2x_gelu": "mlp"}


@dataclasses.dataclass
class Case:
    """`io` holds the inputs and outputs of the reference, `spec` the case's config.json."""

    model: SparseCut
    params: dict[str, Any]
    batch: Batch
    io: dict[str, np.ndarray]
    spec: dict[str, Any]
    report: load.Report


def load_case(name: str) -> Case:
    spec, raw = spec_of(name), config.default()
    raw.fusion.name = FUSIONS[spec["mm_projector_type"]]
    raw.shortcuts.density = "explicit" if spec["vit_levels"] else "none"
    raw.shortcuts.vit_levels = tuple(spec["vit_levels"])
    raw.shortcuts.llm_layers = tuple(spec["llm_layers"])
    raw.init.update(sources_of(name))
    cfg = config.check(raw)
    found = pretrained.open_sources(cfg.init)
    cfg = adopt(cfg, found)
    model = build_model(cfg, intermediates=("hidden", "shortcut_ratio"))
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    abstract = abstract_params(model, cfg, mesh)
    params, report = initial_params(model, cfg, abstract, load.match(abstract, cfg, found))
    io = numbers_of(name)
    return Case(model, params, make_batch(io), io, spec, report)


def spec_of(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "config.json").read_text())


def numbers_of(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / "io.npz") as file:
        return dict(file)


def sources_of(name: str) -> dict[str, str]:
    """{"vision": folder, "llm": folder, "fusion": file} of a case."""
    spec = spec_of(name)
    keys = {"vision": "vision_weights", "llm": "llm_weights", "fusion": "adapter_weights"}
    return {part: str((FOLDER / name / spec[key]).resolve()) for part, key in keys.items()}


def make_batch(io: dict[str, np.ndarray]) -> Batch:
    """The reference's inputs, its one -200 per row replaced by N positions and its padding cut off."""
    count, length = io["expanded_mask"].shape
    pixels = io["pixel_values"].reshape(count, 1, -1, *io["pixel_values"].shape[-3:]).transpose(0, 1, 2, 4, 5, 3)
    batch = empty_batch(batch_spec(count, length, 1, pixels.shape[2:], branched=True))
    batch.loss_mask[:] = io["expanded_labels"] != -100
    batch.segments[:] = io["expanded_mask"]
    batch.positions[:] = np.arange(length)
    for b in range(count):
        ids = io["input_ids"][b][io["attention_mask"][b] == 1]
        batch.image_start[b] = at = int(np.flatnonzero(ids == -200)[0])
        row = [*ids[:at], *[0] * N, *ids[at + 1 :]]
        batch.tokens[b, : len(row)] = row
    return batch.replace(views=pixels)  # already normalised


def to_torch(tree: dict[str, Any], name: str) -> np.ndarray | None:
    """The part of a parameter (or gradient) tree that has the torch name `name`, in torch's layout.

    None for tensors of the tower that do not exist here: unused blocks and post_layernorm.
    """
    vision, llm, projector = tree["vision"], tree["llm"], tree["fusion"]["fuse"]["projector"]
    if match := re.fullmatch(r"model\.mm_projector\.(?:mlp\.)?([02])\.(weight|bias)", name):
        leaf = projector["fc1" if match[1] == "0" else "fc2"]
        return leaf["kernel"].T if match[2] == "weight" else leaf["bias"]
    if name == "model.embed_tokens.weight":
        return llm["embedding"]
    if name == "model.norm.weight":
        return llm["norm"]["scale"]
    if name == "lm_head.weight":
        return llm["head"].T
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        layer = jax.tree.map(lambda x: x[int(match[1])], llm["layers"])
        if match[2] in ("input_layernorm", "post_attention_layernorm"):
            return layer["norm1" if match[2] == "input_layernorm" else "norm2"]["scale"]
        kind = match[2].split(".")[1].removesuffix("_proj")
        if kind in ("gate", "up", "down"):
            return layer["mlp"][kind]["kernel"].T
        if kind == "o":
            return layer["attention"]["out"].reshape(-1, 96).T
        return layer["attention"][kind].reshape(96, -1).T
    if name == "vision_model.embeddings.class_embedding":
        return vision["class_embedding"]
    if name == "vision_model.embeddings.position_embedding.weight":
        return vision["position_embedding"]
    if name == "vision_model.embeddings.patch_embedding.weight":
        return vision["patch_embedding"]["kernel"].reshape(7, 7, 3, 64).transpose(3, 2, 0, 1)
    if match := re.fullmatch(r"vision_model\.pre_layrnorm\.(weight|bias)", name):
        return vision["pre_norm"]["scale" if match[1] == "weight" else "bias"]
    if match := re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        if int(match[1]) >= vision["blocks"]["norm1"]["scale"].shape[0]:
            return None
        block = jax.tree.map(lambda x: x[int(match[1])], vision["blocks"])
        part, weight = match[2], match[3] == "weight"
        if part.startswith("layer_norm"):
            return block["norm" + part[-1]]["scale" if weight else "bias"]
        if part.startswith("mlp"):
            leaf = block[part.removeprefix("mlp.")]
            return leaf["kernel"].T if weight else leaf["bias"]
        kind = part.removeprefix("self_attn.").removesuffix("_proj")
        leaf = block["attention"][f"{kind}_{'kernel' if weight else 'bias'}"]
        if not weight:
            return leaf.reshape(64)
        return leaf.reshape(64, 64).T
    assert re.fullmatch(r"vision_model\.post_layernorm\.(weight|bias)", name), name
    return None
