"""A field of a group of settings."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any


def setting(default: Any, meaning: str) -> Any:
    """A field with this default and, for --help, what it means in one sentence."""
    if isinstance(default, dict):
        return field(default_factory=lambda: copy.copy(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})
