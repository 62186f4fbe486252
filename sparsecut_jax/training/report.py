"""What a run prints and writes: tables at the start, a progress bar, metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from sparsecut_jax import hosts
from sparsecut_jax.models.shortcuts import Plan
from sparsecut_jax.training.holdings import Holding, holdings
from sparsecut_jax.types import TrainState

T = TypeVar("T")
TICK = 1.0  # seconds between updates of a counter on a terminal


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


def size_text(size: int) -> str:
    """Bytes as text with three or more digits: "1.50 GiB"."""
    power = min(3, max(0, int(math.log2(max(1, size)) // 10)))
    value, unit = size / 2 ** (10 * power), ("B", "KiB", "MiB", "GiB")[power]
    return f"{value:,.{0 if value >= 100 or not power else 1 if value >= 10 else 2}f} {unit}"


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


def table(head: list[str], rows: list[list[str]]) -> str:
    """Text with aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join("  " + line(row).rstrip() for row in [head, *rows])


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


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every `seconds`, so that log files stay readable."""

    def __init__(self, total: int, initial: int, name: str, seconds: float = 15.0):
        self.total, self.done, self.name, self.seconds = total, initial, name, seconds
        self.initial, self.text, self.started = initial, "", time.monotonic()
        self.shown = self.steady = self.started
        terminal = sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
        form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self.bar = tqdm(total=total, initial=initial, desc=name, file=sys.stdout, bar_format=form) if terminal else None

    def update(self, n: int = 1) -> None:
        first = self.done == self.initial
        if first:  # it included the compilation and would distort the others
            self.steady = time.monotonic()
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif first and self.text or time.monotonic() - self.shown >= self.seconds or self.done == self.total:
            self._line()

    def note(self, text: str) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def write(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        self.bar.write(text, file=sys.stdout) if self.bar is not None else print(text, flush=True)

    def busy(self, what: str) -> contextlib.AbstractContextManager[list[str]]:
        """As the function `busy`; on a terminal the seconds are counted after the bar."""
        if self.bar is None:
            return busy(what, sys.stdout)
        return _counting(what, lambda text: self.bar.set_postfix_str(text or self.text), self.write)

    def awaiting(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; while waiting for the first one, shows `what` is being waited for."""
        items = iter(items)
        with self.busy(what):
            first = list(itertools.islice(items, 1))
        yield from itertools.chain(first, items)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line(self) -> None:
        self.shown = time.monotonic()
        steps = self.done - self.initial - 1
        pace = (self.shown - self.steady) / steps if steps > 0 else 0.0
        left = f", {pace * (self.total - self.done):.0f}s left" if steps > 0 else ""
        print(f"{self.name} {self.done}/{self.total} [{self.shown - self.started:.0f}s{left}] {self.text}", flush=True)


def busy(what: str, file: IO[str]) -> contextlib.AbstractContextManager[list[str]]:
    """Shows what a block does: on a terminal a line that counts the seconds, elsewhere a line at its start.

    Both end with a line that has the seconds and the remarks that the block appended to the list it was given.
    """
    tell = lambda text: print(text, file=file, flush=True)
    if not file.isatty():
        tell(f"{what} ...")
        return _counting(what, None, tell)
    clear = "\r\x1b[K"
    return _counting(what, lambda text: print(clear + text, end="", file=file, flush=True), tell)


@contextlib.contextmanager
def _counting(what: str, show: Callable[[str], None] | None, tell: Callable[[str], None]) -> Iterator[list[str]]:
    """Calls `show` every second, and with an empty text at the end; calls `tell` after a block that did not fail."""
    began, ended, remarks = time.monotonic(), threading.Event(), []
    seconds = lambda: time.monotonic() - began

    def count() -> None:
        while not ended.wait(TICK):
            show(f"{what} ... {seconds():.0f} s")

    counter = threading.Thread(target=count, daemon=True) if show else None
    if counter:
        show(f"{what} ...")
        counter.start()
    try:
        yield remarks
    finally:
        ended.set()
        if counter:
            counter.join()
            show("")
    tell(", ".join([f"{what}: {seconds():.1f} s", *remarks]))


class Startup:
    """Seconds from the start of the process to the end of its first step, by phase."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = _process_start()

    def done(self, part: str) -> None:
        """Counts the time since the last call as `part`."""
        now = time.time()
        self.parts[part], self._last = now - self._last, now

    def text(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"started in {sum(self.parts.values()):.1f} s: {parts}"


def _process_start() -> float:
    """Start of the process as time.time(); the current time if the system does not tell."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since boot
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()


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
