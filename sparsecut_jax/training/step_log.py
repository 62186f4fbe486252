"""Prints and logs every training step: loss and speed, skipped updates, compilations, and time per step."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sparsecut_jax.runtime import placing
from sparsecut_jax.training.report import source_names
from sparsecut_jax.types import Batch, Exit, UserError

BAD_UPDATES_IN_A_ROW = 3
RECENT = 20  # steps over which the displayed speed is averaged


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What parameters reach on held-out rows.

    loss: mean over the target tokens. accuracy: share of answers that are right (models/losses.py); None for a task whose
    loss is not one over words.
    """

    loss: float
    accuracy: float | None = None


class StepLog:
    """Checks the metrics of every step, and prints and writes those of every `log_every`-th."""

    def __init__(self, cfg, stage, wiring, writer, compilations, progress):
        self.cfg, self.stage, self.span = cfg, stage, stage.span
        self.writer, self.compilations, self.progress = writer, compilations, progress
        self.names = source_names(wiring)
        self.now, self.supervised = time.monotonic(), stage.supervised
        self.tokens, self.flops, self.waited, self.seconds = 0, 0.0, 0.0, []  # since the last line of metrics.jsonl
        self.compiled: set[tuple[int, ...]] = set()  # batch shapes for which the step is compiled
        self.recent: collections.deque = collections.deque(maxlen=RECENT)  # (tokens, FLOPs, seconds) of steps
        self.all_waited, self.all_seconds = 0.0, []  # of all lines but the first, which includes the compilation

    def step(self, step: int, metrics: dict[str, Any], bad_rows: int, positions: int) -> None:
        values = jax.device_get(metrics)
        if "first step" not in self.stage.startup.parts:
            self.stage.startup.done("first step")
            self.progress.write(self.stage.startup.text())
            self.writer.write(step, {"startup": self.stage.startup.parts})
        self.tokens += int(values["tokens"])
        self.supervised += int(values["supervised_tokens"])
        self.flops += self.stage.flops(positions)
        before, self.now = self.now, time.monotonic()
        self.seconds.append(max(self.now - before, 1e-9))
        if self.progress.done > self.progress.initial:  # the first step includes the compilation
            self.recent.append((int(values["tokens"]), self.stage.flops(positions), self.seconds[-1]))
        finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
        if values["supervised_tokens"] == 0:
            if not placing.gather(np.array(bad_rows)).any():
                raise UserError(
                    f"step {step} ({self.span.name}): its batch has no target tokens; check the answers in the data"
                )
            self.progress.write(f"step {step}: all rows of its batch are broken; update skipped")
        if not finite and int(values["streak"]) >= BAD_UPDATES_IN_A_ROW:
            raise Exit(
                4,
                f"diverged: loss or gradient not finite in {BAD_UPDATES_IN_A_ROW} updates in a row, up to step {step}; "
                f"nothing more is saved; restart in another --config.workdir with a lower config.stages.{self.span.name}.lr",
            )
        if not finite:
            self.progress.write(f"step {step}: loss or gradient is not finite; update skipped")
        if step % self.cfg.log_every == 0 or step == self.span.last or step == self.span.first + 1:
            self._write(step, values)
        self.progress.note(self._figures(values))
        self.progress.update()

    def compiling(self, batch: Batch) -> contextlib.AbstractContextManager[Any]:
        """Wraps a step; reports the compilation if the batch has a new shape."""
        shape = batch.tokens.shape
        if shape in self.compiled:
            return contextlib.nullcontext()
        more = f" for sequences of {shape[1]}" if self.compiled else ""
        self.compiled.add(shape)
        return self._compiling(f"compiling the training step{more}")

    @contextlib.contextmanager
    def _compiling(self, what: str) -> Iterator[None]:
        before, cached = self.compilations.count, self.compilations.cached
        with self.progress.busy(what) as remarks:
            yield
            if 0 < self.compilations.count - before == self.compilations.cached - cached:
                remarks.append("from the compilation cache")

    def _figures(self, values: dict[str, Any]) -> str:
        """Loss of this step, speed of the last ones, target tokens so far."""
        figures = [f"loss {values['loss']:.4f}"]
        if self.recent:
            tokens, work, seconds = map(sum, zip(*self.recent, strict=True))
            figures += [f"{tokens / seconds:,.0f} tokens/s"]
            figures += [f"{work / seconds / self.stage.peak:.1%} MFU"] if self.stage.peak else []
        return " | ".join([*figures, f"{self.supervised:,} target tokens"])

    def held_out(self, step: int, reached: HeldOut) -> None:
        line = {"stage": self.span.name, "holdout_loss": reached.loss}
        text = f"step {step}: held-out loss {reached.loss:.4f}"
        if reached.accuracy is not None:
            line["holdout_accuracy"] = reached.accuracy
            text += f", answers {reached.accuracy:.1%} right"
        self.writer.write(step, line)
        self.progress.write(text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from step times."""
        began = time.monotonic()
        yield
        self.now += time.monotonic() - began

    def _write(self, step: int, values: dict[str, Any]) -> None:
        seconds, ratios = sum(self.seconds), values["shortcut_ratio"]
        names = self.names if len(ratios) else ()  # a way of injecting may give none
        line = {
            "stage": self.span.name,
            "loss": _number(values["loss"]),
            "lr": _number(values["lr"]),
            "grad_norm": _number(values["grad_norm"]),
            "grad_norm_by_part": {part: _number(norm) for part, norm in values["grad_norm_by_part"].items()},
            "shortcut_ratio": {name: _number(ratios[layer, a]) for layer, a, name in names},
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens": self.supervised,
            "seconds_per_step": seconds / len(self.seconds),
            "seconds_per_step_median": float(np.median(self.seconds)),
            "seconds_per_step_most": max(self.seconds),
            "model_flops_per_second": self.flops / seconds,
            "mfu": self.flops / seconds / self.stage.peak if self.stage.peak else None,
            "input_wait": self.waited / seconds,
            "skipped_updates": int(values["skipped"]),
            "compilations": self.compilations.count,
            "compilations_cached": self.compilations.cached,
        }
        self.writer.write(step, line)
        if step > self.span.first + 1:
            self.all_waited, self.all_seconds = self.all_waited + self.waited, self.all_seconds + self.seconds
        self.tokens, self.flops, self.waited, self.seconds = 0, 0.0, 0.0, []

    def close(self) -> None:
        if self.all_seconds:
            share = self.all_waited / sum(self.all_seconds)
            low, middle, high = np.quantile(self.all_seconds, [0.05, 0.5, 0.95])
            self.progress.write(
                f"{self.span.name}: median {middle:.3g} s per step (5th to 95th percentile: {low:.3g} to {high:.3g} s), "
                f"{share:.1%} of it waiting for input"
            )
        self.progress.close()


def _number(x: Any) -> float | None:
    """A Python float for JSON; None if not finite."""
    x = float(x)
    return x if np.isfinite(x) else None
