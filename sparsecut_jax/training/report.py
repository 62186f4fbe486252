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

from sparsecut_jax.models.shortcuts import Plan
from sparsecut_jax.runtime import hosts
from sparsecut_jax.runtime.tables import size_text, table
from sparsecut_jax.training.holdings import Holding, holdings
from sparsecut_jax.types import TrainState


def heading(mesh: Mesh, plan: Plan, params: Any, states: dict[str, TrainState], dtype: Any) -> str:
    """Devices, mesh, memory per device and shortcut plan, as text.

    params: shapes and shardings of the parameters at the start; states: those of the train state of every stage.
    """
    devices = mesh.devices.flatten()
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if axis != "replica" or size > 1)
    held = holdings(params, states)
    numbers = {stage: sum(h.trained[stage] for h in held.values()) for stage in states}
    trained = [f"{number:,} of {count(params):,} parameters in {stage}" for stage, number in numbers.items()]
    lines = [
        f"devices    {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process"
        + ("es" if jax.process_count() > 1 else ""),
        f"mesh       {axes}, computing in {jnp.dtype(dtype).name}",
        *([f"trained    {', '.join(trained)}"] if trained else []),
        "",
        holdings_table(held, list(states)),
        "",
        plan_table(plan),
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


def plan_table(plan: Plan) -> str:
    """The shortcuts as a small table."""
    if not plan.pairs:
        return f"shortcuts  none; main feature: output of ViT block {plan.main_level} of {plan.vit_depth}"
    where = "before" if plan.position == "pre" else "after"
    head = f"shortcuts  {len(plan.pairs)}, added {where} the layer; main feature: output of ViT block {plan.main_level}"
    rows = [
        [f"ViT block (of {plan.vit_depth})", *(str(level) for level, _ in plan.pairs)],
        [f"LLM layer (of {plan.llm_depth})", *(str(layer) for _, layer in plan.pairs)],
    ]
    return head + "\n" + table(rows[0], rows[1:])


def count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def shortcut_names(plan: Plan) -> list[tuple[int, int, str]]:
    """(layer, place in the route, "vit3_llm5") of every shortcut."""
    route = plan.route
    return [
        (layer, a, f"vit{plan.levels[route[layer, a]]}_llm{layer}")
        for layer in range(route.shape[0])
        for a in range(route.shape[1])
        if route[layer, a] >= 0
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
    found = []
    try:
        with open(os.path.join(workdir, "metrics.jsonl"), errors="replace") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and isinstance(line.get("step"), int):
                        found.append(line)
    except FileNotFoundError:
        pass
    return found


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + name, value))
    return found
