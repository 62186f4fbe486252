"""Trainable parameters by path regex, AdamW, learning rates by path, warm-up and cosine schedule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import jax
import optax

from sparsecut_jax.models.parameters import Params, join, split
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.types import UserError


def rates(paths: Iterable[str], stage: StageConfig) -> dict[str, float]:
    """{path: factor on the stage's learning rate} for the paths that `stage.lr_of` matches.

    Its regexes match whole names at the beginning of a path: "fusion" matches all of the fusion.

    Raises:
      UserError: a regex matches no trained parameter, or two match the same one.
    """
    paths, factors = list(paths), {}
    for pattern, rate in stage.lr_of.items():
        matched = [path for path in paths if re.match(f"(?:{pattern})(?:/|$)", path)]
        if not matched:
            raise UserError(
                f"lr_of={pattern!r} matches the start of no trained parameter's path; they look like {', '.join(paths[:3])}"
            )
        if twice := factors.keys() & matched:
            raise UserError(f"lr_of sets two rates for {min(twice)}, the second ({rate}) by {pattern!r}; remove one")
        factors |= dict.fromkeys(matched, rate / stage.lr)
    return factors


def checked_rates(paths: Iterable[str], stage: StageConfig, name: str) -> None:
    """Raises UserError, which names the stage, if its `trainable` or `lr_of` do not match the parameters."""
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


def adamw(stage: StageConfig, matrices: Mapping[str, bool]) -> optax.GradientTransformation:
    """AdamW with clipping over a flat dict of trainable parameters. Includes `lr_of`'s factors, not the learning rate.

    matrices: {path: whether weight decay applies to it}, see `models.parameters.matrices`.

    The training step multiplies by -lr itself, because the schedule advances over skipped updates, whereas Adam's own
    count does not.
    """
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(stage.b1, stage.b2),
        optax.add_decayed_weights(stage.weight_decay, mask=lambda tree: {path: matrices[path] for path in tree})
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
