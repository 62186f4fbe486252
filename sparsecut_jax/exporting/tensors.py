"""Turns parameters into tensors of Hugging Face's names and layouts, and writes them as safetensors."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from sparsecut_jax.models.rules import Rule
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.families import TASK, rules_of
from sparsecut_jax.weights.names import to_theirs
from sparsecut_jax.weights.tensors import INDEX

SHARD_SIZE = "5GB"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, or one layer of a stacked one, as part of a tensor; fetched from the devices only when it is written."""

    rule: Rule
    leaf: jax.Array | np.ndarray
    layer: int | None = None

    @property
    def nbytes(self) -> int:
        return self.leaf.nbytes if self.layer is None else self.leaf.nbytes // self.leaf.shape[0]

    def fetch(self) -> np.ndarray:
        leaf = self.leaf
        if self.layer is not None:  # as an operand, so that one compilation serves all layers
            leaf = jax.lax.dynamic_index_in_dim(leaf, np.int32(self.layer), keepdims=False)
        return to_theirs(np.asarray(leaf), self.rule)


def tensors_of(flat: dict[str, jax.Array], cfg: Config, kind: str) -> dict[str, list[Piece]]:
    """{tensor name: its parameters, one layer of each, in the order in which they are packed}."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    inner = "" if cfg.vision.family == "dinov2" else "vision_model."
    prefix = {"vision": f"vision_tower.{inner}", "llm": "language_model.", "fusion": "", TASK: ""}
    if kind in ("llm", "vision"):
        flat = {path: leaf for path, leaf in flat.items() if path.startswith(kind)}
        prefix = {"vision": inner, "llm": ""}
    rules = {rule.path: rule for part in prefix for rule in rules_of(part, cfg, flat)}
    order = {path: i for i, path in enumerate(rules)}  # in which parameters share a tensor
    for path, leaf in flat.items():
        part = path.split("/", 1)[0]
        if path not in rules:
            raise UserError(f"a {getattr(cfg, part).family} model has no tensor for {path}")
        rule = rules[path]
        for i in range(leaf.shape[0] if rule.stacked else 1):
            name = prefix[part] + rule.name.format(i=i)
            pieces[name].append(Piece(rule, leaf, i if rule.stacked else None))
    like = flat.get("vision/blocks/norm1/scale")
    if like is not None:
        # Readers expect a norm after the last block, which is not used here: it is written as the identity.
        name = prefix["vision"] + ("layernorm" if cfg.vision.family == "dinov2" else "post_layernorm")
        pieces[f"{name}.weight"] = [Piece(Rule("", ""), np.ones(like.shape[1:], like.dtype))]
        pieces[f"{name}.bias"] = [Piece(Rule("", ""), np.zeros(like.shape[1:], like.dtype))]
    return {name: sorted(parts, key=lambda piece: order.get(piece.rule.path, 0)) for name, parts in pieces.items()}


def write_tensors(tensors: dict[str, list[Piece]], folder: str, file: str = "model") -> None:
    """Writes `file`.safetensors, or shards and their index, with one shard in memory at a time."""
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda pieces: sum(piece.nbytes for piece in pieces),
        get_storage_id=lambda pieces: None,
        filename_pattern=file + "{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    for file, names in shards.filename_to_tensors.items():
        values = {}
        for name in names:
            rows = [piece.fetch() for piece in tensors[name]]
            values[name] = np.asarray(np.concatenate(rows) if len(rows) > 1 else rows[0], order="C")
        save_tensors(values, os.path.join(folder, file))
    if shards.is_sharded:
        write_json(os.path.join(folder, INDEX), {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def save_tensors(values: dict[str, np.ndarray], path: str) -> None:
    """Writes a safetensors file with the mode that the user's umask gives; safetensors itself makes it 0600."""
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    save_file(values, path, {"format": "pt"})
    os.chmod(path, mode)
