"""Counts the bytes that cross the interconnect in a compiled step, from its HLO text.

The compiler splits one collective into several asynchronous instructions, which share a channel, and prints the body of a
loop once. So each channel counts once per loop, times the loop's trip count, which is read from its condition.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

WIDTHS = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}
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
    """

    kind: str
    bytes: float
    times: int


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a program. hlo: the text of a compiled step (`jax.stages.Compiled.as_text()`)."""
    bodies = _computations(hlo)
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    entry = next(m[1] for m in map(COMPUTATION.match, hlo.splitlines()) if m and m[0].startswith("ENTRY"))
    found: dict[tuple[str, str, str], Collective] = {}

    def walk(name: str, loop: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if match := COLLECTIVE.match(line):
                shapes, kind, start = match.groups()
                channel = re.search(r"channel_id=(\d+)", line)
                key = (loop, kind, channel[1] if channel else line)
                found.setdefault(key, Collective(kind, _incoming(kind, shapes, bool(start), _ways(line)), times))
        for called, trips in calls.get(name, ()):
            walk(called, called if trips else loop, times * (trips or 1))

    walk(entry, "", 1)
    return list(found.values())


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
            for called in [one] if one else re.findall(r"%[\w.-]+", several):
                yield called, 0


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
        found = constant(after.get(added[1])) if added else None
        step = int(found[1]) if found else 1
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


def _incoming(kind: str, shapes: str, started: bool, n: int) -> float:
    """Bytes that a chip receives, from the shapes of the result; a `-start` also returns its operands."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * WIDTHS.get(dtype, 4)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shapes))
    ]
    if started and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :] if kind != "collective-permute" else sizes[1:2]
    size, share = sum(sizes), (n - 1) / n
    return {"all-gather": share, "all-reduce": 2 * share, "all-to-all": share, "reduce-scatter": n - 1}.get(
        kind, 1.0
    ) * size
