"""Bytes per device of every group of parameters: weights and optimizer moments, from their shardings."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import jax
from flax import traverse_util

from sparsecut_jax.types import TrainState

GROUPS = (  # (path regex, group of parameters); the first match counts
    (r".*_lora_[ab]", "llm/adapters"),
    (r"vision/blocks/.*", "vision/blocks"),
    (r"vision/.*", "vision/embeddings"),
    (r"(fusion|task)/.*", r"\1"),
    (r"llm/(embedding|head|layers/attention|layers/mlp)(/.*)?", r"llm/\1"),
    (r"llm/(layers/)?norm\d?/.*", "llm/norms"),
    (r"(\w*).*", r"\1/others"),
)


@dataclasses.dataclass
class Holding:
    """A group of parameters.

    Attributes:
      numbers: {(dtype, mesh axes that shard them): number of parameters}, over all devices.
      weights: bytes per device.
      trained: {stage: number of parameters that it trains}.
      moments: {stage: bytes per device of the optimizer's moments}.
    """

    numbers: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    weights: int = 0
    trained: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    moments: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Holding) -> None:
        self.numbers += other.numbers
        self.weights += other.weights
        self.trained += other.trained
        self.moments += other.moments

    @property
    def total(self) -> int:
        """Bytes per device in the stage with the most moments."""
        return self.weights + max(self.moments.values(), default=0)

    @property
    def dtype(self) -> str:
        """The dtype of most of the parameters."""
        return max(self.numbers, key=lambda kind: self.numbers[kind])[0]

    @property
    def split(self) -> str:
        """Mesh axes, for example "fsdp x tensor" or "80% fsdp x tensor, 20% fsdp"; shares below 1 % are omitted."""
        shares: collections.Counter = collections.Counter()
        for (_, axes), number in self.numbers.items():
            shares[" x ".join(axes) or "replicated"] += number / self.numbers.total()
        parts = [(axes, share) for axes, share in shares.most_common() if share >= 0.01]
        return parts[0][0] if len(parts) == 1 else ", ".join(f"{share:.0%} {axes}" for axes, share in parts)


def holdings(params: Any, states: dict[str, TrainState]) -> dict[str, Holding]:
    """{group: its `Holding`}.

    Args:
      params: shapes and shardings of the parameters at the start.
      states: {stage: shapes and shardings of its train state}.
    """
    groups: dict[str, Holding] = {}
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        group = groups.setdefault(group_of(path), Holding())
        group.numbers[leaf.dtype.name, split_axes(leaf.sharding)] += math.prod(leaf.shape)
        group.weights += bytes_of_one(leaf)
    for stage, state in states.items():
        trained = set()
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
            path = next((key.key for key in keys if isinstance(key, jax.tree_util.DictKey)), None)
            if path is not None:  # otherwise it is a counter
                groups[group_of(path)].moments[stage] += bytes_of_one(leaf)
                trained.add(path)
        for path in trained:
            groups[group_of(path)].trained[stage] += math.prod(flat[path].shape)
    return groups


def group_of(path: str) -> str:
    """The group of a parameter's path."""
    return next(match.expand(name) for pattern, name in GROUPS if (match := re.fullmatch(pattern, path)))


def split_axes(sharding: jax.sharding.NamedSharding) -> tuple[str, ...]:
    """Mesh axes of size above 1 that shard an array, in the order of the mesh."""
    used = {axis for part in sharding.spec if part for axis in ((part,) if isinstance(part, str) else part)}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if axis in used and size > 1)


def bytes_of_one(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes per device of an array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
