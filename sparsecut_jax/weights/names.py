"""Where the numbers of a parameter stand in a tensor of Hugging Face's layout, and how they get from one to the other.

The tables of names are in families.py, and beside each way of fusing (models/rules.py).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import einops
import numpy as np

from sparsecut_jax.models.rules import Rule

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter, or one layer of a stacked one, in its tensor.

    Attributes:
      rule: its name and layout.
      shape: our shape of one layer.
      first: row of the tensor where it begins.
      rows: of the tensor in all, if others share it; 0: it has the tensor for itself.
    """

    rule: Rule
    shape: tuple[int, ...]
    first: int = 0
    rows: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        own = their_shape(self.shape, self.rule)
        return (self.rows, *own[1:]) if self.rows else own

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """The tensor's own rows, or a slice of them (see `slices`), in our layout."""
        if not self.rule.layout:
            return value
        left, _ = _sides(self.rule.layout)
        sizes = _sizes(self.shape, self.rule)  # inner axes are never cut
        inner = {axis: sizes[axis] for group in left for axis in group[1:]}
        return einops.rearrange(value, self.rule.layout, **inner)

    def slices(self, index: Slices) -> tuple[Slices, Slices]:
        """(slices of the tensor to read for `index` of our parameter, slices to keep of that in our layout).

        Axes that cannot be sliced in their layout are read whole and sliced afterwards.
        """
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True))
        if self.rule.layout:
            left, right = _sides(self.rule.layout)
            sizes = _sizes(self.shape, self.rule)
            wanted = {group[0]: s for group, s in zip(right, index, strict=True) if len(group) == 1}
            theirs, followed = [], set()
            for group in left:
                inner = math.prod(sizes[axis] for axis in group[1:])
                # Only the outermost axis of a merged group can be sliced, or an axis of its own.
                if group and group[0] in wanted:
                    start, stop = wanted[group[0]].start, wanted[group[0]].stop
                    theirs.append(slice(start * inner, stop * inner))
                    followed.add(group[0])
                else:
                    theirs.append(slice(0, math.prod(sizes[axis] for axis in group)))
            keep = tuple(
                slice(None) if len(group) == 1 and group[0] in followed else s
                for group, s in zip(right, index, strict=True)
            )
        else:
            theirs, keep = list(index), (slice(None),) * len(index)
        if self.rows:
            theirs[0] = slice(theirs[0].start + self.first, theirs[0].stop + self.first)
        return tuple(theirs), keep


def places(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """{path: its `Place`} for the parameters that have a rule. shapes: {path: shape}, stacks with their leading axis."""
    rules = [rule for rule in rules if rule.path in shapes]
    own = {rule.path: tuple(shapes[rule.path][rule.stacked :]) for rule in rules}
    together: dict[str, list[Rule]] = {}
    for rule in rules:
        together.setdefault(rule.name, []).append(rule)
    placed = {}
    for rule in rules:
        sharing = together[rule.name]
        if len(sharing) == 1:
            placed[rule.path] = Place(rule, own[rule.path])
            continue
        rows = [their_shape(own[other.path], other)[0] for other in sharing]
        placed[rule.path] = Place(rule, own[rule.path], sum(rows[: sharing.index(rule)]), sum(rows))
    return placed


def to_theirs(value: np.ndarray, rule: Rule) -> np.ndarray:
    """A parameter (of one layer) in torch's layout."""
    if not rule.layout:
        return value
    theirs, ours = rule.layout.split(" -> ")
    sizes = _sizes(value.shape, rule)
    inner = {axis: sizes[axis] for group in _sides(rule.layout)[1] for axis in group[1:]}
    return einops.rearrange(value, f"{ours} -> {theirs}", **inner)


def their_shape(shape: Sequence[int], rule: Rule) -> tuple[int, ...]:
    """Shape, in torch's layout, of a parameter of `shape` (of one layer)."""
    if not rule.layout:
        return tuple(shape)
    sizes = _sizes(shape, rule)
    return tuple(math.prod(sizes[axis] for axis in group) for group in _sides(rule.layout)[0])


def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    """Parses "(q h) c -> c q h" into ([["q", "h"], ["c"]], [["c"], ["q"], ["h"]]); a "1" is an empty group."""
    parse = lambda side: [
        [axis for axis in group.strip("()").split() if axis != "1"] for group in re.findall(r"\([^)]*\)|\S+", side)
    ]
    left, right = layout.split(" -> ")
    return parse(left), parse(right)


def _sizes(shape: Sequence[int], rule: Rule) -> dict[str, int]:
    """Sizes of all axes of a rule's layout, from our shape and the sizes that the rule gives."""
    sizes = dict(rule.sizes)
    for group, size in zip(_sides(rule.layout)[1], shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes]
        if len(unknown) > 1:
            raise ValueError(f"the sizes of axes {group}, {size} together, cannot be determined")
        for axis in unknown:
            sizes[axis] = size // math.prod(sizes[other] for other in group if other != axis)
    return sizes
