"""Where the time of a compiled program goes: traces one call and sums it up by part of the model and by pass.

The profiler records when each operation of the compiled program ran; the program's text tells which line of the model it
comes from. The time of operations that run at once is divided between them, so that the shares add up to the whole call.
"""

from __future__ import annotations

import collections
import glob
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from sparsecut_jax.runtime.tables import table

PASSES = ("forward", "again", "backward")  # again: recomputation by remat
LABELS = {"again": "recompute", "all": "total", "products": "of it matmuls"}  # in tables
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
PATH = re.compile(r'op_name="([^"]*)"')
CALLED = re.compile(r"(?:body|calls|to_apply|condition)=%?([\w.-]+)")
WAITS = re.compile(r"(while|call|conditional)\b")  # they only wait for the operations inside them
PRODUCT = re.compile(r" (?:dot|convolution)\(|gemm|matmul|cudnn|flash|splash", re.IGNORECASE)

Interval = tuple[float, float, str]  # start and end in nanoseconds; name of the operation


def traced(run: Callable, *args: Any) -> list[Interval]:
    """The operations of one call on the first device."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(*args))
        data = jax.profiler.ProfileData.from_file(glob.glob(f"{folder}/plugins/profile/*/*.xplane.pb")[0])
    operations, device = [], jax.local_devices()[0].local_hardware_id or 0
    for plane in data.planes:
        number = re.fullmatch(r"/device:.*:(\d+)", plane.name)  # present if there are several GPUs
        if number is not None and int(number[1]) != device:  # another GPU
            continue
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats and stats.get("device_ordinal", device) == device:
                operations.append((event.start_ns, event.start_ns + event.duration_ns, str(stats["hlo_op"])))
    return operations


def shares(operations: Iterable[Interval]) -> tuple[dict[str, float], float]:
    """({operation: its share in seconds}, idle seconds). Operations that only wait for others do not count.

    "Idle" is when nothing ran, or nothing that XLA traces: on CPUs it hands gradients of weights to another library.
    """
    operations = [o for o in operations if not WAITS.match(o[2])]
    edges = sorted(edge for i, (a, b, _) in enumerate(operations) for edge in ((a, 1, i), (b, 0, i)))
    taken: dict[str, float] = collections.defaultdict(float)
    running: set[int] = set()
    idle, last = 0.0, edges[0][0] if edges else 0.0
    for now, begins, i in edges:
        for j in running:
            taken[operations[j][2]] += (now - last) / len(running) / 1e9
        idle += 0 if running else (now - last) / 1e9
        last = now
        running.add(i) if begins else running.discard(i)
    return dict(taken), idle


def origins(program: str) -> dict[str, tuple[str, bool]]:
    """{operation: (line of the model it comes from, whether it is a matmul)}, from the text of a compiled program."""
    text, callers, inside, computation = {}, {}, collections.defaultdict(list), ""
    for line in program.splitlines():
        if (began := COMPUTATION.match(line)) is not None:
            computation = began[1]
        elif (named := INSTRUCTION.match(line)) is not None:
            text[named[1]] = (line, computation)
            inside[computation].append(line)
            callers |= dict.fromkeys(CALLED.findall(line), named[1])

    def path(name: str) -> str:
        """The op_name of the operation, else of one fused into it, else of the loop that contains it."""
        line, computation = text[name]
        fused = [line for called in CALLED.findall(line) for line in inside[called]]
        for candidate in (line, *reversed(fused)):
            if (named := PATH.search(candidate)) is not None:
                return named[1]
        return path(callers[computation]) if computation in callers else ""

    def product(name: str) -> bool:
        line = text[name][0]
        return bool(PRODUCT.search("\n".join([line, *(x for called in CALLED.findall(line) for x in inside[called])])))

    return {name: (path(name), product(name)) for name in text}


def place(path: str) -> tuple[str, str]:
    """(part of the model, pass) of an op_name as JAX writes it; "transpose" marks the backward pass."""
    words = re.split(r"[/()]", path)
    of = next((part for part in ("update", "loss", "fusion", "vision", "llm") if part in words), "other")
    if of in ("vision", "llm"):
        of += " attention" if "attention" in words else " MLP" if {"mlp", "fc1", "fc2"} & set(words) else " rest"
    which = "again" if "rematted_computation" in words else "backward" if "transpose(" in path else "forward"
    return of, "forward" if of in ("update", "loss") else which


def summary(seconds: Mapping[str, float], idle: float, program: str) -> list[dict[str, Any]]:
    """One row per part of the model: seconds by pass, in total, and of matmuls among them. The longest first."""
    known, rows = origins(program), {}
    for name, time in seconds.items():
        path, product = known.get(name, ("", False))
        of, which = place(path)
        row = rows.setdefault(of, {"part": of, **dict.fromkeys(PASSES, 0.0), "all": 0.0, "products": 0.0})
        row[which] += time
        row["all"] += time
        row["products"] += time * product
    rows = sorted(rows.values(), key=lambda row: -row["all"])
    return [*rows, {"part": "not traced", "all": idle}]


def text(rows: list[dict[str, Any]]) -> str:
    """The rows of `summary` as a table in milliseconds."""
    total = sum(row["all"] for row in rows)
    cell = lambda row, key: f"{row[key] * 1e3:,.1f}" if row.get(key) else "-"
    keys = (*PASSES, "all", "products")
    return table(
        ["part", *(f"{LABELS.get(key, key)} ms" for key in keys), "share"],
        [[row["part"], *(cell(row, key) for key in keys), f"{row['all'] / total:.1%}"] for row in rows if row["all"]],
    )
