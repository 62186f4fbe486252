"""One stage of training on the host: feeds the step, logs, evaluates, saves, and knows when to stop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparsecut_jax import hosts, placing
from sparsecut_jax.cli import Exit
from sparsecut_jax.data.pipeline import next_batch
from sparsecut_jax.data.walk import Bad
from sparsecut_jax.models.shortcuts import Plan
from sparsecut_jax.settings import Config, StageConfig
from sparsecut_jax.training.checkpoint import Checkpoints, NotFinite
from sparsecut_jax.training.report import MetricsWriter, Progress, Startup, shortcut_names
from sparsecut_jax.types import Batch, TrainState, UserError

BAD_UPDATES_IN_A_ROW = 3
RECENT = 20  # steps whose speed is shown


@dataclasses.dataclass(frozen=True)
class StageSpan:
    """A stage and its optimizer steps first..last-1 of the run."""

    name: str
    stage: StageConfig
    first: int
    last: int


def plan_stages(cfg: Config, batches: dict[str, int]) -> list[StageSpan]:
    """The stages of a run, given the number of batches of each."""
    spans, first = [], 0
    for name in cfg.run_stages:
        spans.append(StageSpan(name, cfg.stages[name], first, first + batches[name]))
        first += batches[name]
    if cfg.profile and int(cfg.profile.split(":")[1]) > first:
        raise UserError(f"config.profile={cfg.profile!r} ends after the last of the run's {first} steps")
    return spans


class StopSignal:
    """Remembers a SIGTERM, so that the run can save at the next step boundary.

    Several processes may get it at different steps, or only one of them: JAX, which takes the signal there, finds a
    step that none has reached yet.
    """

    def __init__(self) -> None:
        self.noted = False
        self.before = signal.SIG_DFL if hosts.several() else signal.signal(signal.SIGTERM, self._note)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step. All processes must ask, once for every step."""
        return multihost_utils.reached_preemption_sync_point(step) if hosts.several() else self.noted

    def restore(self) -> None:
        """From here on SIGTERM ends the process as usual."""
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: Any) -> None:
        self.noted = True


class Compilations:
    """Counts the programs that this process has got ready, and how many of them came from the compilation cache."""

    def __init__(self) -> None:
        self.count = self.cached = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)
        jax.monitoring.register_event_listener(self._note_cached)

    def _note(self, event: str, *_: Any, **__: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def _note_cached(self, event: str, **_: Any) -> None:
        self.cached += event == "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Stage:
    """What a stage needs besides the state.

    Attributes:
      step: the jitted training step.
      data: iterator of (Batch on the devices, bad rows met while reading it).
      note_bad: takes the bad rows; raises UserError above the limit.
      holdout_loss: function of the parameters, mean loss on held-out rows; None for no evaluation.
      flops: model FLOPs of a batch whose sequences have so many positions (planning/flops.py).
      peak: FLOP/s of all devices, 0 where no vendor states them.
      startup: is told when the first step of the process has ended.
      meta: what a checkpoint says beside arrays.
      clock: seconds that the run has taken so far, earlier starts included.
      is_last: whether held-out losses are compared to find the best checkpoint.
      supervised: supervised tokens of the steps before, where a stage is resumed.
    """

    span: StageSpan
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    data: Iterator[tuple[Batch, list[Bad]]]
    note_bad: Callable[[list[Bad]], None]
    holdout_loss: Callable[[Any], float] | None
    flops: Callable[[int], float]
    peak: float
    startup: Startup
    meta: dict[str, Any]
    clock: Callable[[], float]
    is_last: bool
    supervised: int


def run_stage(
    stage: Stage,
    state: TrainState,
    cfg: Config,
    plan: Plan,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    stop: StopSignal,
    compilations: Compilations,
) -> TrainState:
    """Trains from state.step to the end of the stage.

    Raises:
      Exit: 3 after SIGTERM, once everything is saved; 4 after BAD_UPDATES_IN_A_ROW updates without a finite
        loss and gradient, or when a parameter is not finite.
      UserError: a batch without one supervised token.
    """
    span, at = stage.span, int(state.step)
    window = [int(x) for x in cfg.profile.split(":")] if cfg.profile else [-1, -1]
    log = _Log(cfg, stage, plan, writer, compilations, Progress(span.last - span.first, at - span.first, span.name))
    pending: tuple[int, dict[str, Any], int, int] | None = None  # a step, its metrics, its bad rows, positions of a row
    evaluated: dict[int, float] = {}
    tracing = False
    # CPU devices share a pool of threads: of two steps under way at once each could wait for the other's forever.
    one_at_a_time = jax.default_backend() == "cpu" and jax.device_count() > 1

    def evaluate(step: int) -> None:
        if stage.holdout_loss is not None and step not in evaluated:
            first = (
                log.progress.busy("first evaluation on held-out rows") if not evaluated else contextlib.nullcontext()
            )
            with first:
                evaluated[step] = stage.holdout_loss(state.params)
            log.held_out(step, evaluated[step])

    def save() -> None:
        step = int(state.step)
        loss = evaluated.get(step) if stage.is_last else None
        try:
            checkpoints.save(state, {**stage.meta, "seconds": stage.clock(), "supervised_tokens": log.supervised}, loss)
        except NotFinite as error:
            raise Exit(4, f"stopped without saving: {error}") from error

    try:
        while at < span.last:
            if window[0] <= at < window[1] and not tracing and hosts.first():
                jax.profiler.start_trace(f"{cfg.workdir}/profile")
                tracing = True
            began = time.monotonic()
            batch, bad = next_batch(stage.data)
            log.waited += time.monotonic() - began
            stage.note_bad(bad)
            with log.compiling(batch):
                state, metrics = stage.step(state, batch)
            if one_at_a_time:
                jax.block_until_ready(metrics)
            at += 1
            # The step before is read only now, while this one runs: the device never waits for the host.
            if pending is not None:
                log.step(*pending)
            pending = (at, metrics, len(bad), batch.tokens.shape[1])
            if at == window[1] and tracing:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                tracing = False
                log.progress.write(f"profile of steps {cfg.profile} in {cfg.workdir}/profile")
            ends, stopping = at == span.last, stop.asked(at)
            due = cfg.checkpoint.every and at % cfg.checkpoint.every == 0
            if ends or stopping or due or (cfg.eval.every and at % cfg.eval.every == 0):
                log.step(*pending)
                pending = None
            with log.paused():
                if ends or (cfg.eval.every and at % cfg.eval.every == 0):
                    evaluate(at)
                if ends or due or stopping:
                    save()
            if stopping:
                checkpoints.manager.wait_until_finished()
                raise Exit(3, f"stopped by SIGTERM after saving step {at}; the same command goes on from there")
    finally:
        if tracing:
            jax.profiler.stop_trace()
        log.close()
    return state


class _Log:
    """Looks at the metrics of every step, and shows and writes those of every `log_every`-th."""

    def __init__(self, cfg, stage, plan, writer, compilations, progress):
        self.cfg, self.stage, self.span = cfg, stage, stage.span
        self.writer, self.compilations, self.progress = writer, compilations, progress
        self.names = shortcut_names(plan)
        self.now, self.supervised = time.monotonic(), stage.supervised
        self.tokens, self.flops, self.waited, self.seconds = 0, 0.0, 0.0, []  # since the line before
        self.compiled: set[tuple[int, ...]] = set()  # shapes of batches that the step has seen
        self.recent: collections.deque = collections.deque(maxlen=RECENT)  # (tokens, FLOPs, seconds) of steps
        self.all_waited, self.all_seconds = 0.0, []  # of all lines but the first, which has the compilation

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
        if self.progress.done > self.progress.initial:  # the first step has the compilation
            self.recent.append((int(values["tokens"]), self.stage.flops(positions), self.seconds[-1]))
        finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
        if values["supervised_tokens"] == 0:
            if not placing.gather(np.array(bad_rows)).any():
                raise UserError(
                    f"step {step} ({self.span.name}): its batch has no supervised token; check the answers of the data"
                )
            self.progress.write(f"step {step}: all rows of its batch are broken; this update is left out")
        if not finite and int(values["streak"]) >= BAD_UPDATES_IN_A_ROW:
            raise Exit(
                4,
                f"diverged: loss or gradient not finite in {BAD_UPDATES_IN_A_ROW} updates in a row, up to step {step}; "
                f"nothing more is saved; start again in another --config.workdir with a lower config.stages.{self.span.name}.lr",
            )
        if not finite:
            self.progress.write(f"step {step}: loss or gradient is not finite; this update is left out")
        if step % self.cfg.log_every == 0 or step == self.span.last or step == self.span.first + 1:
            self._write(step, values)
        self.progress.note(self._figures(values))
        self.progress.update()

    def compiling(self, batch: Batch) -> contextlib.AbstractContextManager[Any]:
        """Around a step: tells that it is compiled where it meets a batch of a new shape."""
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
                remarks.append("taken from the compilation cache")

    def _figures(self, values: dict[str, Any]) -> str:
        """Of this step, and the speed of the last ones."""
        figures = [f"loss {values['loss']:.4f}"]
        if self.recent:
            tokens, work, seconds = map(sum, zip(*self.recent, strict=True))
            figures += [f"{tokens / seconds:,.0f} tokens/s"]
            figures += [f"{work / seconds / self.stage.peak:.1%} MFU"] if self.stage.peak else []
        return " | ".join([*figures, f"{self.supervised:,} supervised"])

    def held_out(self, step: int, loss: float) -> None:
        self.writer.write(step, {"stage": self.span.name, "holdout_loss": loss})
        self.progress.write(f"step {step}: held-out loss {loss:.4f}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the block takes is no step's time."""
        began = time.monotonic()
        yield
        self.now += time.monotonic() - began

    def _write(self, step: int, values: dict[str, Any]) -> None:
        seconds = sum(self.seconds)
        line = {
            "stage": self.span.name,
            "loss": _number(values["loss"]),
            "lr": _number(values["lr"]),
            "grad_norm": _number(values["grad_norm"]),
            "grad_norm_by_part": {part: _number(norm) for part, norm in values["grad_norm_by_part"].items()},
            "shortcut_ratio": {name: _number(values["shortcut_ratio"][layer, a]) for layer, a, name in self.names},
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
                f"{self.span.name}: {middle:.3g} s a step ({low:.3g} to {high:.3g} in 9 of 10), "
                f"{share:.1%} of it waiting for input"
            )
        self.progress.close()


def _number(x: Any) -> float | None:
    """A Python float that JSON can hold; None for what is not finite."""
    x = float(x)
    return x if np.isfinite(x) else None
