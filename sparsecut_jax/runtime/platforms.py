"""Refuses a run whose devices are not of the requested platform, with one sentence on what to do."""

from __future__ import annotations

import traceback

import jax

from sparsecut_jax.types import UserError

REMEDY = {
    "tpu": 'install "jax[tpu]" and run on a TPU VM, which no other process may be using',
    "gpu": 'install "jax[cuda13]", and see that nvidia-smi lists a GPU',
    "cpu": "set JAX_PLATFORMS=cpu",
}


def require(platform: str | None) -> None:
    """Raises UserError if JAX's devices are not of `platform` ("tpu", "gpu" or "cpu"; None accepts any)."""
    if platform is None:
        return
    try:
        devices = jax.devices()
    except Exception as error:
        if reason := missing(error):
            raise UserError(f"--require-platform={platform}: {reason}") from error
        raise
    if devices[0].platform != platform:
        devices_text = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
        raise UserError(f"--require-platform={platform}: JAX finds only {devices_text}; {REMEDY[platform]}")


def missing(error: BaseException) -> str | None:
    """A sentence if the error means that JAX cannot use the devices in JAX_PLATFORMS; None for any other error."""
    asked = jax.config.jax_platforms
    text = str(error)
    if "Unable to initialize backend" in text:
        reason = text.splitlines()[0].partition(": ")[2].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    elif isinstance(error, AssertionError) and _raised_in(error, "xla_bridge.py"):
        reason = "none found"  # JAX gives no message if it sees no GPU
    else:
        return None
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    remedy = REMEDY.get(kind, "expected cpu, tpu or cuda")
    return f"JAX_PLATFORMS={asked} asks for devices that JAX cannot use ({reason}); {remedy}, or unset JAX_PLATFORMS"


def _raised_in(error: BaseException, file: str) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith(file)
