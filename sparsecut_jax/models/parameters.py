"""Parameter trees and their paths."""

from __future__ import annotations

import functools
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util

from sparsecut_jax.types import UserError

flatten = functools.partial(traverse_util.flatten_dict, sep="/")


unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")


Params = dict[str, Any]
STACKS = ("layers", "sites", "levels")  # logical axes along which parameters of one kind are stacked


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


def is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Whether a parameter with these logical axes is a matrix: at least two are left without stacks and "head_dim".

    Weight decay applies to matrices alone, and only they may be stored and differentiated in the compute dtype. Biases,
    norm scales, gates and class tokens are none, and neither is a stack of them.
    """
    return sum(axis not in (*STACKS, "head_dim") for axis in axes) >= 2  # head_dim is a part of the heads


def matrices(boxed: Any) -> dict[str, bool]:
    """{path: whether the parameter `is_matrix`} for a tree of parameters boxed with their logical axes (`layers.weight`).

    Raises:
      ValueError: a parameter was made without naming its axes.
    """
    flat = flatten(boxed)
    for path, box in flat.items():
        if not isinstance(box, nn.meta.AxisMetadata):
            raise ValueError(f"parameter {path} has no logical axes; make it with models.layers.weight")
    return {path: is_matrix(box.names) for path, box in flat.items()}
