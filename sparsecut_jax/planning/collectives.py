"""Reads the collectives of a compiled step from its HLO text: how many bytes they move, and what they gather.

The compiler splits one collective into several asynchronous instructions, which share a channel, and prints the body of a
loop once. So each channel counts once per loop, times the loop's trip count, which is read from its condition.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from sparsecut_jax.planning.memory import Parameters, Sizes
from sparsecut_jax.runtime.hardware import Topology
from sparsecut_jax.runtime.sharding import ONE_AT_A_TIME

WIDTHS = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
}  # fmt: skip
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%[\w.-]+ = (.+?) ({KINDS})(-start)?\(")
WHILE = re.compile(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)")
CALLED = re.compile(r"(?:calls|to_apply|called_computation)=(%[\w.-]+)|branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a step.

    Attributes:
      kind: name of the HLO operation, for example "all-gather".
      bytes: bytes that a chip receives each time, with a ring algorithm.
      times: how often it runs in a step.
      shapes: of the arrays that come out, without those of int32, which hold ids.
      origin: the line of the model that it comes from, as JAX names it; "" if unknown.
    """

    kind: str
    bytes: float
    times: int
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), compare=False)
    origin: str = dataclasses.field(default="", compare=False)


def collectives_of(hlo: str) -> list[Collective]:
    """All collectives of a program. hlo: the text of a compiled step (`jax.stages.Compiled.as_text()`)."""
    bodies = _computations(hlo)
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    entry = next(m[1] for m in map(COMPUTATION.match, hlo.splitlines()) if m and m[0].startswith("ENTRY"))
    known: dict[tuple[str, str, str], Collective] = {}

    def walk(name: str, loop: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if match := COLLECTIVE.match(line):
                text, kind, start = match.groups()
                arrays = _results(kind, text, bool(start))
                named, channel = (re.search(pattern, line) for pattern in (r'op_name="([^"]*)"', r"channel_id=(\d+)"))
                shapes = tuple(shape for dtype, shape in arrays if dtype != "s32")
                each = Collective(kind, _incoming(kind, arrays, _ways(line)), times, shapes, named[1] if named else "")
                known.setdefault((loop, kind, channel[1] if channel else line), each)
        for called, trips in calls.get(name, ()):
            walk(called, called if trips else loop, times * (trips or 1))

    walk(entry, "", 1)
    return list(known.values())


def _computations(hlo: str) -> dict[str, list[str]]:
    """{name of a computation: its lines}."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            lines = bodies.setdefault(match[1], [])
        else:
            lines.append(line)
    return bodies


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation called by these lines, trip count of the loop that calls it; 0 if it is not a loop)."""
    for line in lines:
        if match := WHILE.search(line):
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            yield match[2], int(known[1]) if known else _trips(bodies[match[1]], bodies[match[2]])
            continue
        for one, several in CALLED.findall(line):
            yield from ((called, 0) for called in ([one] if one else re.findall(r"%[\w.-]+", several)))


def _trips(condition: list[str], body: list[str]) -> int:
    """Trip count of a loop that counts up to a constant; 1 if it is only known at run time.

    The step of the counter matters: windowed einsums handle several pieces of a matrix in one iteration.
    """
    before, after = (dict(re.findall(r"(%[\w.-]+) = (.*)", "\n".join(lines))) for lines in (condition, body))
    constant = lambda text: re.search(r"^[su]32\[\]\S* constant\((\d+)\)", text or "")
    compared = re.search(r"compare\((%[\w.-]+), (%[\w.-]+)\)", "\n".join(condition))
    limit = constant(before.get(compared[2])) if compared else None
    if not limit:
        return 1
    step, counter = 1, re.search(r"index=(\d+)", before.get(compared[1], ""))
    ends = re.search(r"^\s*ROOT .* tuple\(([^)]*)\)", "\n".join(body), re.MULTILINE)
    if counter and ends:
        named = re.findall(r"%[\w.-]+", ends[1])[int(counter[1])]
        added = re.search(r" add\(%[\w.-]+, (%[\w.-]+)\)", after.get(named, ""))
        increment = constant(after.get(added[1])) if added else None
        step = int(increment[1]) if increment else 1
    return -(-int(limit[1]) // step)


def _ways(line: str) -> int:
    """Number of chips in one group of the collective."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 2  # a permutation lists pairs


def _results(kind: str, text: str, started: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the arrays that come out; a `-start` also returns its operands."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", text))
    arrays = [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in found]
    if started and kind != "all-reduce" and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    return arrays


def _incoming(kind: str, arrays: Sequence[tuple[str, tuple[int, ...]]], n: int) -> float:
    """Bytes that a chip receives."""
    share = (n - 1) / n
    shares = {"all-gather": share, "all-reduce": 2 * share, "all-to-all": share, "reduce-scatter": n - 1}
    return shares.get(kind, 1.0) * sum(math.prod(shape) * WIDTHS.get(dtype, 4) for dtype, shape in arrays)


def crossing(step: Sequence[Collective], topology: Topology) -> dict[str, Any]:
    """Bytes that a chip receives in a step, by kind of collective, and the seconds at the rate of the interconnect."""
    by_kind: dict[str, float] = collections.Counter()
    for each in step:
        by_kind[each.kind] += each.bytes * each.times
    total = sum(by_kind.values())
    return {"bytes": dict(by_kind), "total": total, "seconds": total / topology.chip.link}


def gathered_activations(step: Iterable[Collective], weights: Collection[tuple[int, ...]]) -> list[Collective]:
    """The all-gathers of anything but weights, of which `weights` are the shapes (`weight_shapes`), and ids."""
    plain = {_without_ones(shape) for shape in weights}
    foreign = lambda shape: _without_ones(shape) not in plain
    return [each for each in step if each.kind == "all-gather" and any(map(foreign, each.shapes))]


def weight_shapes(parameters: Parameters, sizes: Sizes) -> set[tuple[int, ...]]:
    """Shapes of parameters, of one layer of a stack, and of their shards on a mesh of `sizes`."""
    cuts = {math.prod(taken) for taken in itertools.product(*((1, size) for size in sizes.values()))}
    found = set()
    for path, shape in parameters.shapes.items():
        stacked = any(axis in ONE_AT_A_TIME for axis in parameters.axes[path][:1])
        for whole in {shape, shape[1:] if stacked else shape}:
            for cut in itertools.product(cuts, repeat=len(whole)):
                if all(n % c == 0 for n, c in zip(whole, cut, strict=True)):
                    found.add(tuple(n // c for n, c in zip(whole, cut, strict=True)))
    return found


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n > 1)
