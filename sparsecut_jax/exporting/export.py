"""Exports a trained model as a folder that other programs can read: safetensors, config.json, tokenizer, image processor."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from sparsecut_jax.models.fusion import views_of
from sparsecut_jax.models.rules import Rule
from sparsecut_jax.models.shortcuts import Plan
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.settings import Config, ShortcutConfig
from sparsecut_jax.text.templates import begins_with_bos
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.config_json import llm_config_json, vision_config_json
from sparsecut_jax.weights.families import rules_of
from sparsecut_jax.weights.names import to_theirs
from sparsecut_jax.weights.resize import grow_rows
from sparsecut_jax.weights.tensors import INDEX

KINDS = ("auto", "sparsecut", "llava", "llm", "vision", "adapter")
IMAGE_TOKEN = "<image>"
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


def write(run: Run, folder: str, kind: str, drop_shortcuts: bool) -> str:
    """Writes the model into `folder` and returns what it was written as.

    kind: "sparsecut" for the whole model, which `convert from-hf --model` reads; "llava" for transformers'
    LlavaForConditionalGeneration; "llm" or "vision" for that part alone; "auto" for llava where that is the same model,
    else sparsecut.

    Raises:
      UserError: the format cannot represent the model.
    """
    plan = run.model.plan
    if run.config.lora.rank and kind != "vision":
        raise UserError(
            f"{run.workdir} has LoRA adapters; --merge adds them to the LLM's weights, --as=adapter writes them separately"
        )
    if kind == "auto":
        kind = "llava" if drop_shortcuts or not _not_llava(run.config, plan) else "sparsecut"
    if kind == "llava":
        reason = _not_llava(run.config, dataclasses.replace(plan, pairs=()) if drop_shortcuts else plan)
        if reason:
            raise UserError(f"this model cannot be written as llava: {reason}")
    cfg, params = portable(run, drop_shortcuts and kind == "llava")
    tokenizer, image_id = run.tokenizer, None
    if kind == "llava":
        tokenizer, image_id = _with_image_token(run.tokenizer, cfg.llm.vocab_size)
        cfg, params = _with_room(cfg, params, image_id)
    flat = traverse_util.flatten_dict(params, sep="/")
    text = {} if kind == "vision" else llm_config_json(cfg.llm, _special_ids(tokenizer))
    vision = {} if kind == "llm" else vision_config_json(cfg.vision, cfg.vision.layers)
    config = text | vision if kind in ("llm", "vision") else _whole_config(cfg, text, vision, image_id)
    config["dtype"] = str(flat["llm/embedding"].dtype)
    write_tensors(tensors_of(flat, cfg, kind), folder)
    write_json(os.path.join(folder, "config.json"), config)
    if kind != "vision" and tokenizer is not None:
        tokenizer.save(folder, begins_with_bos(run.template))
    if kind != "llm":
        write_json(os.path.join(folder, "preprocessor_config.json"), _image_processor(cfg))
    if kind == "llava":
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": cfg.vision.patch_size,
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            "num_additional_image_tokens": int(cfg.vision.class_token),
            "image_token": IMAGE_TOKEN,
        }
        write_json(os.path.join(folder, "processor_config.json"), processor)
    lost = f"; without its {len(plan.pairs)} shortcuts, a different model" if plan.pairs and kind == "llava" else ""
    return f"{run.workdir}, step {run.step}, as {config['model_type']} in {config['dtype']}{lost}"


def _not_llava(cfg: Config, plan: Plan) -> str:
    """Why transformers' LLaVA cannot represent this model; "" if it can."""
    if views_of(cfg.fusion) > 1:
        return f"its fusion {cfg.fusion.name!r} reads hi-res views, which LLaVA does not have; use --as=sparsecut"
    if plan.pairs:
        return (
            f"it has {len(plan.pairs)} shortcuts, and without them it would be a different model; use --as=sparsecut, or "
            "--drop-shortcuts to leave them out"
        )
    if not cfg.fusion.shared:
        return "its fusion has separate weights for each level (config.fusion.shared=False); use --as=sparsecut"
    if cfg.vision.family not in ("clip", "siglip"):
        return f"LLaVA does not read a {cfg.vision.family} tower; use --as=sparsecut"
    return ""


def portable(run: Run, drop_shortcuts: bool) -> tuple[Config, dict[str, Any]]:
    """Config and parameters with the tower's real depth and the plan as explicit pairs; without shortcuts if asked."""
    cfg, plan, params = run.config, run.model.plan, run.params
    depth = params["vision"]["blocks"]["norm1"]["scale"].shape[0]
    pairs = () if drop_shortcuts else plan.pairs
    if drop_shortcuts:
        depth = plan.main_level + 1
        blocks = jax.tree.map(lambda leaf: leaf[:depth], params["vision"]["blocks"])
        params = {**params, "vision": {**params["vision"], "blocks": blocks}}
    shortcuts = ShortcutConfig(
        density="explicit" if pairs else "none",
        vit_levels=tuple(level for level, _ in pairs),
        llm_layers=tuple(layer for _, layer in pairs),
        position=plan.position,
    )
    vision = dataclasses.replace(cfg.vision, layers=depth, select_layer=plan.main_level - depth)
    return dataclasses.replace(cfg, vision=vision, shortcuts=shortcuts), params


def tensors_of(flat: dict[str, jax.Array], cfg: Config, kind: str) -> dict[str, list[Piece]]:
    """{tensor name: its parameters, one layer of each, in the order in which they are packed}."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    inner = "" if cfg.vision.family == "dinov2" else "vision_model."
    prefix = {"vision": f"vision_tower.{inner}", "llm": "language_model.", "fusion": ""}
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
            values[name] = np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])
        save_tensors(values, os.path.join(folder, file))
    if shards.is_sharded:
        write_json(os.path.join(folder, INDEX), {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def save_tensors(values: dict[str, np.ndarray], path: str) -> None:
    """Writes a safetensors file with the mode that the user's umask gives; safetensors itself makes it 0600."""
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    save_file(values, path, {"format": "pt"})
    os.chmod(path, mode)


def _whole_config(cfg: Config, text: dict, vision: dict, image_id: int | None) -> dict[str, Any]:
    """config.json of the whole model: LLaVA's keys, plus fusion and plan for a sparsecut model."""
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": cfg.vision.select_layer,
        "vision_feature_select_strategy": "default" if cfg.vision.class_token else "full",
        "image_seq_length": cfg.tokens_per_image,
        "tie_word_embeddings": cfg.llm.tie_embeddings,
        "prompt": {"template": cfg.stages[cfg.run_stages[-1]].template, "max_images": cfg.data.max_images},
    }
    if image_id is not None:
        return config | {"image_token_index": image_id}
    plan = cfg.shortcuts
    return config | {
        "model_type": "sparsecut",
        "architectures": ["SparseCutForConditionalGeneration"],
        "image_fit": cfg.data.image_fit,
        "fusion": {"name": cfg.fusion.name, "shared": cfg.fusion.shared, "grid": list(cfg.fusion.grid)},
        "shortcuts": {
            "vit_levels": list(plan.vit_levels),
            "llm_layers": list(plan.llm_layers),
            "position": plan.position,
        },
    }


def _image_processor(cfg: Config) -> dict[str, Any]:
    """preprocessor_config.json that makes an image square as config.data.image_fit does."""
    size, fit = cfg.vision.image_size, cfg.data.image_fit
    return {
        "image_processor_type": "LlavaImageProcessor" if fit == "pad" else "CLIPImageProcessor",
        "do_pad": fit == "pad",
        "do_resize": True,
        "size": {"height": size, "width": size} if fit == "squash" else {"shortest_edge": size},
        "do_center_crop": fit == "crop",
        "crop_size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.vision.mean),
        "image_std": list(cfg.vision.std),
    }


def _with_image_token(tokenizer: Tokenizer | None, vocab_size: int) -> tuple[Tokenizer | None, int]:
    """LLaVA marks images with a token of their own. Returns a tokenizer that has it, and its id."""
    if tokenizer is None:
        return None, vocab_size
    return tokenizer.with_special(IMAGE_TOKEN)


def _with_room(cfg: Config, params: dict[str, Any], image_id: int) -> tuple[Config, dict[str, Any]]:
    """Adds rows for the image token if the vocabulary has none left; the image's features overwrite them."""
    if image_id < cfg.llm.vocab_size:
        return cfg, params
    size = -(-(image_id + 1) // 64) * 64
    llm = dict(params["llm"])
    llm["embedding"] = grow_rows(np.asarray(llm["embedding"]), size)
    if "head" in llm:
        llm["head"] = grow_rows(np.asarray(llm["head"]).T, size).T
    return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=size)), {**params, "llm": llm}


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    if tokenizer is None:  # explicit, since a family's own defaults may lie outside a small vocabulary
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    bos = tokenizer.bos if tokenizer.bos >= 0 else None
    return {"bos_token_id": bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
