"""What is trained, and how fast: path regexes, AdamW, warm-up and cosine."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
from flax import traverse_util

from sparsecut_jax.settings import StageConfig
from sparsecut_jax.types import UserError

Params = dict[str, Any]


def split(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """Parameter tree -> (trainable, frozen), two flat dicts {path: leaf}. Raises UserError if a regex matches nothing."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise UserError(f"trainable={pattern!r} matches no parameter; paths look like {', '.join(list(flat)[:3])}")
    trainable = {k: v for k, v in flat.items() if any(re.fullmatch(p, k) for p in patterns)}
    return trainable, {k: v for k, v in flat.items() if k not in trainable}


def join(*parts: Params) -> Params:
    """Flat dicts {path: leaf} -> one parameter tree."""
    return traverse_util.unflatten_dict({k: v for part in parts for k, v in part.items()}, sep="/")


def decayed(path: str) -> bool:
    """Weight decay is for matrices: not for norms, LayerScale, biases and class tokens."""
    return not re.search(r"(norm\w*/|bias$|_bias$|class_embedding$|scale[12]$)", path)


def schedule(stage: StageConfig, steps: int) -> optax.Schedule:
    """Learning rate of step 0..steps-1 of a stage: linear warm-up, then cosine to final_lr * lr."""
    warmup = max(1, round(stage.warmup * steps)) if stage.warmup > 0 else 0
    return optax.warmup_cosine_decay_schedule(
        init_value=stage.lr / warmup if warmup else stage.lr,
        peak_value=stage.lr,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=stage.final_lr * stage.lr,
    )


def adamw(stage: StageConfig) -> optax.GradientTransformation:
    """Clipped AdamW over a flat dict of trainable parameters, without the learning rate.

    The step multiplies by -lr itself: the schedule follows the run's step, also over updates that
    were left out, whereas Adam's own count stands still there.
    """
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(stage.b1, stage.b2),
        optax.add_decayed_weights(stage.weight_decay, mask=lambda tree: {path: decayed(path) for path in tree})
        if stage.weight_decay > 0
        else optax.identity(),
    )


def part_sizes(flat: Params) -> dict[str, int]:
    """Number of parameters of each part of a flat dict {path: array}."""
    sizes: dict[str, int] = {}
    for path, leaf in flat.items():
        part = path.split("/", 1)[0]
        sizes[part] = sizes.get(part, 0) + leaf.size
    return sizes


def part_norms(flat: Params) -> dict[str, jax.Array]:
    """L2 norm of each part ("vision", "fusion", "llm") of a flat dict {path: array}."""
    parts: dict[str, dict] = {}
    for path, leaf in flat.items():
        parts.setdefault(path.split("/", 1)[0], {})[path] = leaf
    return {part: optax.tree.norm(leaves) for part, leaves in parts.items()}
