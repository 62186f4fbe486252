"""What is trained, and how fast: path regexes, AdamW, warm-up and cosine."""

from __future__ import annotations

import re
from collections.abc import Iterable
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


def is_matrix(path: str) -> bool:
    """What weight decay is for, and what frozen parts may round: not norms, LayerScale, biases and class tokens."""
    return not re.search(r"(norm\w*/|bias$|_bias$|class_embedding$|scale[12]$)", path)


def rates(paths: Iterable[str], stage: StageConfig) -> dict[str, float]:
    """{path: share of the stage's learning rate} for the paths that `stage.lr_of` names.

    A regex there matches whole names at the beginning of a path: "fusion" is all of the fusion.

    Raises:
      UserError: one of them matches no trained parameter, or two match the same.
    """
    paths, found = list(paths), {}
    for pattern, rate in stage.lr_of.items():
        matched = [path for path in paths if re.match(f"(?:{pattern})(?:/|$)", path)]
        if not matched:
            raise UserError(
                f"lr_of has {pattern!r}, which begins no trained parameter's path; they look like {', '.join(paths[:3])}"
            )
        if twice := found.keys() & matched:
            raise UserError(f"lr_of has two rates for {min(twice)}; the second is {rate} by {pattern!r}")
        found |= dict.fromkeys(matched, rate / stage.lr)
    return found


def checked_rates(paths: Iterable[str], stage: StageConfig, name: str) -> None:
    """Raises UserError, which names the stage, if its `trainable` or `lr_of` do not go with the parameters."""
    try:
        rates(split(join(dict.fromkeys(paths, 0)), stage.trainable)[0], stage)
    except UserError as error:
        raise UserError(f"config.stages.{name}.{error}") from error


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
    """Clipped AdamW over a flat dict of trainable parameters, without the learning rate but for `lr_of`'s share of it.

    The step multiplies by -lr itself: the schedule follows the run's step, also over updates that
    were left out, whereas Adam's own count stands still there.
    """
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(stage.b1, stage.b2),
        optax.add_decayed_weights(stage.weight_decay, mask=lambda tree: {path: is_matrix(path) for path in tree})
        if stage.weight_decay > 0
        else optax.identity(),
        *([_scale_by_path(stage)] if stage.lr_of else []),
    )


def _scale_by_path(stage: StageConfig) -> optax.GradientTransformation:
    def scaled(updates: Params, params: Params | None) -> Params:
        factors = rates(updates, stage)
        return {path: update * factors.get(path, 1.0) for path, update in updates.items()}

    return optax.stateless(scaled)


def part_norms(flat: Params) -> dict[str, jax.Array]:
    """L2 norm of each part ("vision", "fusion", "llm") of a flat dict {path: array}."""
    parts: dict[str, dict] = {}
    for path, leaf in flat.items():
        parts.setdefault(path.split("/", 1)[0], {})[path] = leaf
    return {part: optax.tree.norm(leaves) for part, leaves in parts.items()}
