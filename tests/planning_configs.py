"""Configs for the tests of the planner: those of configs/, and how to change single settings of them."""

from __future__ import annotations

import importlib
from typing import Any

from sparsecut_jax import config
from sparsecut_jax.settings import Config


def load(file: str, arguments: str = "", **changes: Any) -> tuple[Config, str]:
    """(checked config of configs/`file`.py, its stage); `changes` are dotted keys, "__" for a dot, "stage__" for the
    settings of the stage."""
    raw = importlib.import_module(f"configs.{file}").get_config(arguments)
    stage = raw.run_stages[-1]
    for key, value in changes.items():
        *path, last = key.split("__")
        group = raw
        for name in path:
            group = group["stages"][stage] if name == "stage" else group[name]
        group[last] = value
    return config.check(raw), stage
