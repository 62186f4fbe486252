"""SparseCut in JAX: a vision tower joined to a language model at many depths (arXiv 2602.00505).

import sparsecut_jax

model = sparsecut_jax.load("runs/base")
model.answer("what color is the shape?", "picture.png")
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "load"]


def __getattr__(name: str) -> Any:
    """Names are imported where they are asked for: JAX takes a second, and may be set up before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)
