"""Exports LoRA adapters: merged into the LLM, or alone in PEFT's format."""

from __future__ import annotations

import collections
import dataclasses
import os
import re

import numpy as np
from flax import traverse_util

from sparsecut_jax.exporting.tensors import save_tensors, tensors_of, write_tensors
from sparsecut_jax.models.lora import is_adapter, merge
from sparsecut_jax.models.rules import Rule
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.families import rules_of

PREFIX = "base_model.model."


def merged(run: Run) -> Run:
    """The run with every adapter merged into its linear layer, in that layer's dtype.

    Raises:
      UserError: the run has no adapters.
    """
    lora = run.config.lora
    if not lora.rank:
        raise UserError(f"--merge: {run.workdir} has no LoRA adapters; leave out --merge")
    none = dataclasses.replace(lora, rank=0)
    flat = merge(traverse_util.flatten_dict(run.params, sep="/"), lora)
    return dataclasses.replace(
        run,
        config=dataclasses.replace(run.config, lora=none),
        model=run.model.clone(lora=none),
        params=traverse_util.unflatten_dict(flat, sep="/"),
    )


def write_adapter(run: Run, folder: str) -> str:
    """Writes adapter_model.safetensors and adapter_config.json for PEFT, and the fusion as fusion.safetensors.

    The adapters apply to the LLM that the run started from. Returns a sentence on what was written.

    Raises:
      UserError: the run has no adapters, PEFT cannot represent them, or the run trained other parameters too.
    """
    cfg, lora = run.config, run.config.lora
    if not lora.rank:
        raise UserError(f"--as=adapter: {run.workdir} has no LoRA adapters; use --as=llm")
    flat = traverse_util.flatten_dict(run.params, sep="/")
    patterns = [pattern for name in cfg.run_stages for pattern in cfg.stages[name].trainable]
    for path in flat:
        lost = not is_adapter(path) and not path.startswith("fusion/")
        if lost and any(re.fullmatch(pattern, path) for pattern in patterns):
            raise UserError(
                f"--as=adapter: {run.workdir} also trained {path}, which is neither adapter nor fusion; use --merge, which keeps it"
            )
    rules = {rule.path.removesuffix("/kernel"): rule for rule in rules_of("llm", cfg)}
    shared = collections.Counter(rule.name for rule in rules.values())
    tensors, modules = {}, set()
    for path in filter(is_adapter, flat):
        base, _, letter = path.rpartition("_lora_")
        rule, leaf = rules[base], np.asarray(flat[path])
        if shared[rule.name] > 1:
            raise UserError(
                f"--as=adapter: a {cfg.llm.family} model stores {base} and others in one tensor, for which PEFT has a single "
                "adapter; use --merge"
            )
        modules.add(_module(rule).rpartition(".")[2])
        for i, value in enumerate(leaf if rule.stacked else leaf[None]):
            matrix = value.reshape((-1, lora.rank) if letter == "a" else (lora.rank, -1)).T  # torch has [out, in]
            name = f"{PREFIX}{_module(rule).format(i=i)}.lora_{letter.upper()}.weight"
            tensors[name] = np.ascontiguousarray(matrix)
    save_tensors(tensors, os.path.join(folder, "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.init.llm or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(os.path.join(folder, "adapter_config.json"), config)
    fusion = {path: leaf for path, leaf in flat.items() if path.startswith("fusion/")}
    write_tensors(tensors_of(fusion, cfg, "fusion"), folder, "fusion")
    return f"{run.workdir}, step {run.step}, as LoRA adapters of rank {lora.rank} for {', '.join(sorted(modules))}, and the fusion"


def _module(rule: Rule) -> str:
    return rule.name.removesuffix(".weight")
