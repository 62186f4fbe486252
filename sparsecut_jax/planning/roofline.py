"""The roofline of a step on a topology: the largest of the times for its matmuls, memory traffic, interconnect traffic
and network traffic, each at the vendor's peak rate (planning/hardware.py); and the interconnect traffic of a compiled step,
from its HLO text.

The compiler splits one collective into several asynchronous instructions, which share a channel, and prints the body of a
loop once. So each channel counts once per loop, times the loop's trip count, which is read from its condition.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from sparsecut_jax.planning.hardware import Topology
from sparsecut_jax.planning.jaxprs import Product
from sparsecut_jax.planning.memory import Parameters, Sizes
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import Config

WIDTHS = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
}  # fmt: skip
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%[\w.-]+ = (.+?) ({KINDS})(-start)?\(")
WHILE = re.compile(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)")
CALLED = re.compile(r"(?:calls|to_apply|called_computation)=(%[\w.-]+)|branch_computations=\{([^}]*)\}")
UPDATE = 7  # float32 numbers that Adam reads (p, m, v, g) and writes (p, m, v) for each trained parameter


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step."""

    compute: float  # recomputation included
    memory: float
    links: float  # interconnect within a slice or node
    network: float  # between slices or nodes

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def bound(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(
    cfg: Config, name: str, topology: Topology, sizes: Sizes, products: Sequence[Product], parameters: Parameters
) -> Roofline:
    """The roofline of a step of stage `name`; `products` are its matmuls over the whole batch."""
    chip, stage, chips = topology.chip, cfg.stages[name], topology.chips
    itemsize, micro_batches = jnp.dtype(cfg.dtype).itemsize, stage.accumulate
    trained = parameters.local(sizes, parameters.trained)
    flops = sum(p.flops * (1 + p.more + p.again) for p in products)
    moved = UPDATE * trained
    for p in products:
        weights = p.weights / sizes["tensor"] * micro_batches
        moved += (1 + p.more + p.again) * itemsize * (p.moved / chips + weights)
    through = {"links": 0.0, "network": 0.0}
    for axis, bytes_in in traffic(cfg, name, sizes, parameters, products).items():
        through["network" if crosses(topology, sizes, axis) else "links"] += bytes_in
    return Roofline(
        compute=flops / chips / chip.flops,
        memory=moved / chip.bandwidth,
        links=through["links"] / chip.link,
        network=through["network"] / chip.network,
    )


def traffic(
    cfg: Config, name: str, sizes: Sizes, parameters: Parameters, products: Sequence[Product]
) -> dict[str, float]:
    """Bytes that a chip receives in a step, by the mesh axis they cross.

    fsdp: weights are gathered for forward and again for backward, and gradients reduce-scattered, in every micro-batch.
    data, replica: the gradients of a step are all-reduced. tensor: what attention and MLPs return, a sum over heads or
    hidden units, is all-reduced in forward, backward and recomputation.
    """
    micro_batches, dtype = cfg.stages[name].accumulate, cfg.dtype
    share = lambda axis: (sizes[axis] - 1) / sizes[axis]
    parts = {p.part for p in products if p.more}
    backward = lambda path: path.split("/")[0] in parts
    gathered = parameters.local(sizes, gathered=dtype) + parameters.local(sizes, backward, dtype)
    gathered += parameters.local(sizes, parameters.trained, dtype)
    trained = parameters.local(sizes, parameters.trained)
    summed = lambda p: any(parameters.axes[p.path][axis] in ("heads", "mlp") for axis in p.contracted)
    sums = sum(p.outputs * (1 + (p.more > 0) + p.again) for p in products if summed(p))
    rows = math.prod(sizes[axis] for axis in sharding.RULES["batch"])
    return {
        "fsdp": gathered * share("fsdp") * micro_batches,
        "data": 2 * trained * share("data"),
        "replica": 2 * trained * share("replica"),
        "tensor": 2 * sums * jnp.dtype(dtype).itemsize / rows * share("tensor"),
    }


def crosses(topology: Topology, sizes: Sizes, axis: str) -> bool:
    """Whether a mesh axis spans several slices or nodes; the last axes of a mesh are the innermost."""
    axes = sharding.MESH_AXES[sharding.MESH_AXES.index(axis) :]
    return topology.slices > 1 and math.prod(sizes[a] for a in axes) > topology.chips // topology.slices


# --- collectives of a compiled step ---


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


def collectives_of(hlo: str) -> list[Collective]:
    """All collectives of a program. hlo: the text of a compiled step (`jax.stages.Compiled.as_text()`)."""
    bodies = _computations(hlo)
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    entry = next(m[1] for m in map(COMPUTATION.match, hlo.splitlines()) if m and m[0].startswith("ENTRY"))
    known: dict[tuple[str, str, str], Collective] = {}

    def walk(name: str, loop: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if match := COLLECTIVE.match(line):
                shapes, kind, start = match.groups()
                channel = re.search(r"channel_id=(\d+)", line)
                key = (loop, kind, channel[1] if channel else line)
                known.setdefault(key, Collective(kind, _incoming(kind, shapes, bool(start), _ways(line)), times))
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


def crossing(step: Sequence[Collective], topology: Topology) -> dict[str, Any]:
    """Bytes that a chip receives in a step, by kind of collective, and the seconds at the rate of the interconnect."""
    by_kind: dict[str, float] = collections.defaultdict(float)
    for each in step:
        by_kind[each.kind] += each.bytes * each.times
    total = sum(by_kind.values())
    return {"bytes": dict(by_kind), "total": total, "seconds": total / topology.chip.link}
