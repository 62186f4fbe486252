"""What a run prints and writes: tables at the start, a progress bar, metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsecut_jax.models.interfaces import Wiring
from sparsecut_jax.runtime import hosts
from sparsecut_jax.runtime.tables import size_text, table
from sparsecut_jax.training.holdings import Holding, holdings
from sparsecut_jax.types import TrainState

SOURCES = 8  # in a line of the table of what enters which layer


def heading(mesh: Mesh, wiring: Wiring, params: Any, states: dict[str, TrainState], dtype: Any) -> str:
    """Devices, mesh, memory per device and wiring, as text.

    params: shapes and shardings of the parameters at the start; states: those of the train state of every stage.
    """
    devices = mesh.devices.flatten()
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if axis != "replica" or size > 1)
    holdings_by_part = holdings(params, states)
    numbers = {stage: sum(h.trained[stage] for h in holdings_by_part.values()) for stage in states}
    trained = [f"{number:,} of {count(params):,} parameters in {stage}" for stage, number in numbers.items()]
    lines = [
        f"devices    {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process"
        + ("es" if jax.process_count() > 1 else ""),
        f"mesh       {axes}, computing in {jnp.dtype(dtype).name}",
        *([f"trained    {', '.join(trained)}"] if trained else []),
        "",
        holdings_table(holdings_by_part, list(states)),
        "",
        wiring_table(wiring),
    ]
    return "\n".join(lines)


def holdings_table(held: dict[str, Holding], stages: list[str]) -> str:
    """A table with a row for every group of parameters; sizes are per device."""

    def row(name: str, h: Holding, dtype: str, split: str) -> list[str]:
        moments = [size_text(h.moments[stage]) if h.moments[stage] else "-" for stage in stages]
        return [name, f"{h.numbers.total():,}", dtype, split, size_text(h.weights), *moments, size_text(h.total)]

    total = Holding()
    for h in held.values():
        total.add(h)
    head = ["part", "parameters", "dtype", "sharded over", "weights", *(f"moments in {stage}" for stage in stages)]
    rows = [row(name, h, h.dtype, h.split) for name, h in held.items()]
    return table([*head, "per device"], [*rows, row("total", total, "", "")])


def wiring_table(wiring: Wiring) -> str:
    """What enters which layer of the LLM, as a small table."""
    shortcuts = wiring.shortcuts
    if shortcuts is None:
        return _source_table(wiring)
    if not shortcuts.pairs:
        return f"shortcuts  none; main feature: output of ViT block {shortcuts.main_level} of {shortcuts.vit_depth}"
    where = "before" if shortcuts.position == "pre" else "after"
    head = (
        f"shortcuts  {len(shortcuts.pairs)}, added {where} the layer; main feature: output of ViT block "
        f"{shortcuts.main_level}"
    )
    rows = [
        [f"ViT block (of {shortcuts.vit_depth})", *(str(level) for level, _ in shortcuts.pairs)],
        [f"LLM layer (of {shortcuts.llm_depth})", *(str(layer) for _, layer in shortcuts.pairs)],
    ]
    return head + "\n" + table(rows[0], rows[1:])


def _source_table(wiring: Wiring) -> str:
    blocks = ", ".join("input" if level < 0 else str(level) for level in wiring.levels)
    question = f" and up to {wiring.question} tokens of the question" * bool(wiring.question)
    head = f"fusion     reads ViT blocks {blocks}{question}; {wiring.positions} positions per image"
    if not wiring.names:
        return f"{head}; nothing is injected"
    entries = [(wiring.names[row], layer) for layer, rows in enumerate(wiring.entering) for row in rows]
    lines = [f"{head}; injected by {wiring.injecting!r}"]
    for first in range(0, len(entries), SOURCES):
        names, layers = zip(*entries[first : first + SOURCES], strict=True)
        lines.append(table(["source", *names], [[f"LLM layer (of {len(wiring.entering)})", *map(str, layers)]]))
    return "\n".join(lines)


def count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def source_names(wiring: Wiring) -> list[tuple[int, int, str]]:
    """(layer, place in the route, "vit3_llm5") of every source that enters a layer."""
    return [
        (layer, place, f"{wiring.names[row]}_llm{layer}")
        for layer, rows in enumerate(wiring.entering)
        for place, row in enumerate(rows)
    ]


class MetricsWriter:
    """Writes metrics.jsonl and TensorBoard events; a resumed run first removes lines after its checkpoint.

    In a multi-process run only process 0 writes.
    """

    def __init__(self, workdir: str, first_step: int):
        self.file = self.events = None
        if not hosts.first():
            return
        from tensorboardX import SummaryWriter

        self.path = os.path.join(workdir, "metrics.jsonl")
        lines = [json.dumps(line) + "\n" for line in read_metrics(workdir) if line["step"] <= first_step]
        with open(self.path + ".tmp", "w") as file:
            file.writelines(lines)
        os.replace(self.path + ".tmp", self.path)
        self.file = open(self.path, "a")  # noqa: SIM115 - open for the whole run
        self.events = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in _scalars(values):
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.events.close()


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; incomplete or damaged ones are skipped."""
    lines = []
    try:
        with open(os.path.join(workdir, "metrics.jsonl"), errors="replace") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and isinstance(line.get("step"), int):
                        lines.append(line)
    except FileNotFoundError:
        pass
    return lines


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + name, value))
    return found
