"""What "auto" means on each platform, and what a platform lacks: dtype, attention, rematerialisation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

ATTENTION = {"cpu": ("tiled", "xla"), "gpu": ("cudnn", "xla"), "tpu": ("splash", "xla")}  # the first is what auto takes

PARTS = ("vision", "fusion", "llm")


def resolve(cfg: Config, platform: str | None = None, branched: bool = False) -> Config:
    """The config with every "auto" of attention, remat and dtypes replaced by what `platform` takes.

    platform: "cpu", "gpu" or "tpu"; None: that of the default devices.
    branched: whether rows have independent questions, which the fused kernels cannot keep apart.

    Raises:
      UserError: an attention backend or remat policy that the platform lacks.
    """
    platform = platform or jax.default_backend()
    dtype = ("float32" if platform == "cpu" else "bfloat16") if cfg.dtype == "auto" else cfg.dtype
    known = ATTENTION.get(platform, ("xla",))
    if cfg.attention not in ("auto", *known):
        raise UserError(
            f"config.attention={cfg.attention!r} does not run on {platform}; expected {' or '.join(known)}, or auto"
        )
    reasons = [reason for wrong, reason in _limits(cfg, dtype, branched).get(known[0], ()) if wrong]
    attention = ("xla" if reasons else known[0]) if cfg.attention == "auto" else cfg.attention
    if attention == known[0] and reasons:
        raise UserError(f"config.attention={attention!r} {reasons[0]}; expected 'xla' or 'auto'")
    remat = "none" if platform == "cpu" else "full"
    parts = {}
    for part in PARTS:
        settings = getattr(cfg, part)
        if settings.remat == "offload" and platform == "cpu":
            raise UserError(
                f"config.{part}.remat='offload' moves activations to the host's memory, and a CPU has no other; "
                "expected none, dots, full or auto"
            )
        parts[part] = dataclasses.replace(settings, remat=remat if settings.remat == "auto" else settings.remat)
    return dataclasses.replace(cfg, attention=attention, dtype=dtype, **parts)


def _limits(cfg: Config, dtype: str, branched: bool) -> dict[str, list[tuple[bool, str]]]:
    """What the fused kernels cannot do: pairs of whether the config asks for it, and how to say that."""
    together = (branched, 'cannot keep independent questions of one image apart (rows with "independent": true)')
    some_windows = bool(cfg.llm.sliding_window and cfg.llm.sliding_from)
    mixed = (some_windows, f"has one window for all layers, but config.llm.sliding_from={cfg.llm.sliding_from}")
    return {
        "splash": [together, mixed],
        "cudnn": [together, mixed, (dtype == "float32", "computes in bfloat16, but config.dtype is float32")],
    }


def resolve_for_inference(cfg: Config, platform: str | None = None) -> Config:
    """As `resolve`, for a run that may have been trained on another platform."""
    parts = {part: dataclasses.replace(getattr(cfg, part), remat="none") for part in PARTS}
    return resolve(dataclasses.replace(cfg, attention="auto", **parts), platform)


def compute_dtype(cfg: Config) -> jnp.dtype:
    """Of the computation; `cfg` is resolved."""
    return jnp.dtype(cfg.dtype)
