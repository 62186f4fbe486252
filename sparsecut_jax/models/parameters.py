"""Parameter trees and their paths."""

from __future__ import annotations

import functools
import re
from typing import Any

from flax import traverse_util

from sparsecut_jax.types import UserError

flatten = functools.partial(traverse_util.flatten_dict, sep="/")


unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")


Params = dict[str, Any]


def split(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits a parameter tree into (trainable, frozen), two flat dicts {path: leaf}.

    Raises:
      UserError: a regex matches no parameter.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise UserError(f"trainable={pattern!r} matches no parameter; paths look like {', '.join(list(flat)[:3])}")
    trainable = {k: v for k, v in flat.items() if any(re.fullmatch(p, k) for p in patterns)}
    return trainable, {k: v for k, v in flat.items() if k not in trainable}


def join(*parts: Params) -> Params:
    """Joins flat dicts {path: leaf} into one parameter tree."""
    return traverse_util.unflatten_dict({k: v for part in parts for k, v in part.items()}, sep="/")


def is_matrix(path: str) -> bool:
    """Whether weight decay applies to a parameter, and it may be stored in the compute dtype if frozen.

    False for norms, LayerScale, biases and class tokens.
    """
    return not re.search(r"(norm\w*/|bias$|_bias$|class_embedding$|scale[12]$)", path)
