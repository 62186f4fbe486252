"""Resolves "auto" settings (dtype, attention, remat) for a platform, and refuses what the platform does not support."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

ATTENTION = {"cpu": ("tiled", "xla"), "gpu": ("cudnn", "xla"), "tpu": ("splash", "xla")}  # auto takes the first

PARTS = ("vision", "fusion", "llm")


def resolve(cfg: Config, platform: str | None = None, branched: bool = False) -> Config:
    """The config with every "auto" of attention, remat and dtype replaced by the choice for `platform`.

    Args:
      cfg: the config.
      platform: "cpu", "gpu" or "tpu"; None: that of the default devices.
      branched: whether rows have independent questions, which the fused kernels cannot mask from each other.

    Raises:
      UserError: the platform does not support the attention backend or a remat policy.
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
                f"config.{part}.remat='offload' moves activations to host memory, where a CPU already has them; "
                "expected none, dots, full or auto"
            )
        parts[part] = dataclasses.replace(settings, remat=remat if settings.remat == "auto" else settings.remat)
    return dataclasses.replace(cfg, attention=attention, dtype=dtype, **parts)


def _limits(cfg: Config, dtype: str, branched: bool) -> dict[str, list[tuple[bool, str]]]:
    """Limits of the fused kernels: {backend: [(whether the config hits the limit, its description)]}."""
    together = (branched, 'cannot mask independent questions of one image (rows with "independent": true)')
    some_windows = bool(cfg.llm.sliding_window and cfg.llm.sliding_from)
    mixed = (some_windows, f"needs one window for all layers, but config.llm.sliding_from={cfg.llm.sliding_from}")
    return {
        "splash": [together, mixed],
        "cudnn": [together, mixed, (dtype == "float32", "computes in bfloat16, but config.dtype is float32")],
    }


def resolve_for_inference(cfg: Config, platform: str | None = None) -> Config:
    """As `resolve`, with attention chosen for this platform and no remat: the run may have trained on another one."""
    return resolve(dataclasses.replace(without_remat(cfg), attention="auto"), platform)


def without_remat(cfg: Config) -> Config:
    """The config with nothing computed again in the backward pass."""
    return dataclasses.replace(cfg, **{p: dataclasses.replace(getattr(cfg, p), remat="none") for p in PARTS})


def compute_dtype(cfg: Config) -> jnp.dtype:
    """The compute dtype. `cfg` is resolved, its dtype is not "auto"."""
    return jnp.dtype(cfg.dtype)
