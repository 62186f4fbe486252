"""Exports a trained model as a folder that other programs can read: safetensors, config.json, tokenizer, image processor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np

from sparsecut_jax.exporting.tensors import tensors_of, write_tensors
from sparsecut_jax.models import levels, ways
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.models.rules import LLAVA
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.settings import Config, ShortcutConfig
from sparsecut_jax.tasks.registry import TASKS, task_of
from sparsecut_jax.text.templates import begins_with_bos
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.config_json import llm_config_json, vision_config_json
from sparsecut_jax.weights.families import tables_of
from sparsecut_jax.weights.resize import grow_rows

KINDS = ("auto", "sparsecut", "llava", "llm", "vision", "adapter")
IMAGE_TOKEN = "<image>"


def write(run: Run, folder: str, kind: str, drop_shortcuts: bool) -> str:
    """Writes the model into `folder` and returns what it was written as.

    kind: "sparsecut" for the whole model, which `convert from-hf --model` reads; "llava" for transformers'
    LlavaForConditionalGeneration; "llm" or "vision" for that part alone; "auto" for llava where that is the same model,
    else sparsecut.

    Raises:
      UserError: the format cannot represent the model.
    """
    wiring = run.model.wiring
    if run.config.lora.rank and kind != "vision":
        raise UserError(
            f"{run.workdir} has LoRA adapters; --merge adds them to the LLM's weights, --as=adapter writes them separately"
        )
    if kind == "auto":
        kind = "llava" if drop_shortcuts or not _not_llava(run, False) else "sparsecut"
    if kind == "llava":
        reason = _not_llava(run, drop_shortcuts)
        if reason:
            raise UserError(f"this model cannot be written as llava: {reason}")
    cfg, params = portable(run, drop_shortcuts and kind == "llava")
    tokenizer, image_id = run.tokenizer, None
    if kind == "llava":
        tokenizer, image_id = _with_image_token(run.tokenizer, cfg.llm.vocab_size)
        cfg, params = _with_room(cfg, params, image_id)
    flat = flatten(params)
    text = {} if kind == "vision" else llm_config_json(cfg.llm, _special_ids(tokenizer))
    depth = _depth(params) if kind == "vision" else cfg.vision.layers
    vision = {} if kind == "llm" else vision_config_json(cfg.vision, depth)
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
    entries = sum(map(len, wiring.entering))
    lost = f"; without its {entries} shortcuts, a different model" if entries and kind == "llava" else ""
    return f"{run.workdir}, step {run.step}, as {config['model_type']} in {config['dtype']}{lost}"


def _not_llava(run: Run, drop_shortcuts: bool) -> str:
    """Why transformers' LLaVA cannot represent this model; "" if it can."""
    cfg, wiring = run.config, run.model.wiring
    fusion, patches, entries = f"its fusion {cfg.fusion.name!r}", levels.patches(cfg), sum(map(len, wiring.entering))
    if wiring.grid:
        return f"{fusion} reads hi-res views, which LLaVA does not have; use --as=sparsecut"
    if wiring.question:
        return f"{fusion} reads the question, which LLaVA's does not; use --as=sparsecut"
    if wiring.positions != patches:
        return f"an image takes {wiring.positions} positions, in LLaVA one for each of its {patches} patches; use --as=sparsecut"
    if entries and not wiring.shortcuts:
        return f"{fusion} injects into layers of the LLM, which LLaVA's does not; use --as=sparsecut"
    if entries and not drop_shortcuts:
        return (
            f"it has {entries} shortcuts, and without them it would be a different model; use --as=sparsecut, or "
            "--drop-shortcuts to leave them out"
        )
    if hasattr(task_of(cfg).module, "Model"):
        return f"task {cfg.task.name!r} has a model of its own, which LLaVA does not know; use --as=sparsecut"
    theirs = {rule.path for rule in tables_of(cfg.fusion.name).get(LLAVA, ())}
    paths = {f"fusion/{path}" for path in flatten(run.params["fusion"])}
    if not theirs:
        return f"{fusion} is not LLaVA's projector; use --as=sparsecut"
    if wiring.hidden not in (0, cfg.llm.width):
        return f"its projector has {wiring.hidden} hidden channels, LLaVA's as many as the LLM's width, {cfg.llm.width}; use --as=sparsecut"
    if paths - theirs:
        return f"{fusion} has parameters that LLaVA's projector does not have, as {min(paths - theirs)}; use --as=sparsecut"
    if not cfg.fusion.shared:
        return "its fusion has separate weights for each level (config.fusion.shared=False); use --as=sparsecut"
    if cfg.vision.family not in ("clip", "siglip"):
        return f"LLaVA does not read a {cfg.vision.family} tower; use --as=sparsecut"
    return ""


def portable(run: Run, drop_shortcuts: bool) -> tuple[Config, dict[str, Any]]:
    """Config and parameters with the tower's real depth and the shortcuts as explicit pairs; without shortcuts if asked.

    The config of a fusion that follows no shortcuts stays as it is: its sources may depend on the depth of the whole tower.
    """
    wiring, params = run.model.wiring, run.params
    shortcuts = wiring.shortcuts
    cfg = dataclasses.replace(run.config, fusion=ways.portable(run.config.fusion, wiring))
    if shortcuts is None:
        return cfg, params
    depth = _depth(params)
    pairs = () if drop_shortcuts else shortcuts.pairs
    if drop_shortcuts:
        depth = shortcuts.main_level + 1
        blocks = jax.tree.map(lambda leaf: leaf[:depth], params["vision"]["blocks"])
        params = {**params, "vision": {**params["vision"], "blocks": blocks}}
    explicit = ShortcutConfig(
        density="explicit" if pairs else "none",
        vit_levels=tuple(level for level, _ in pairs),
        llm_layers=tuple(layer for _, layer in pairs),
        position=shortcuts.position,
    )
    vision = dataclasses.replace(cfg.vision, layers=depth, select_layer=shortcuts.main_level - depth)
    return dataclasses.replace(cfg, vision=vision, shortcuts=explicit), params


def _depth(params: dict[str, Any]) -> int:
    """Blocks of the tower that have parameters."""
    return params["vision"]["blocks"]["norm1"]["scale"].shape[0]


def _whole_config(cfg: Config, text: dict, vision: dict, image_id: int | None) -> dict[str, Any]:
    """config.json of the whole model: LLaVA's keys, plus fusion and shortcuts for a sparsecut model."""
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": cfg.vision.select_layer,
        "vision_feature_select_strategy": "default" if cfg.vision.class_token else "full",
        "image_seq_length": ways.positions(cfg),
        "tie_word_embeddings": cfg.llm.tie_embeddings,
        "prompt": {"template": cfg.stages[cfg.run_stages[-1]].template, "max_images": cfg.data.max_images},
    }
    if image_id is not None:
        return config | {"image_token_index": image_id}
    wiring, shortcuts = ways.wiring_of(cfg), dataclasses.asdict(cfg.shortcuts)
    if wiring.shortcuts:  # explicit ones, see `portable`
        shortcuts = {key: shortcuts[key] for key in ("vit_levels", "llm_layers", "position")}
    fusion = {"name": cfg.fusion.name, "shared": cfg.fusion.shared, "grid": list(cfg.fusion.grid)}
    injecting = _own_settings(cfg.injecting, wiring.injecting, ways.INJECTING)
    task = {"name": cfg.task.name} | _own_settings(cfg.task, cfg.task.name, TASKS)
    return (
        config
        | {
            "model_type": "sparsecut",
            "architectures": ["SparseCutForConditionalGeneration"],
            "image_fit": cfg.data.image_fit,
            "fusion": fusion | _own_settings(cfg.fusion, cfg.fusion.name, ways.FUSING),
            "shortcuts": shortcuts,
        }
        | ({"injecting": injecting} if injecting else {})
        | ({"task": task} if cfg.task.name != Config().task.name else {})
    )


def _own_settings(group: Any, way: str, known: Mapping[str, ModuleType]) -> dict[str, Any]:
    """{way: its own settings}; {} if it has none."""
    own = ways.own_settings(group, way, known)
    return {} if own is None else {way: dataclasses.asdict(own)}


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
