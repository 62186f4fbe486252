"""The training loop of one stage: feeds the step, logs, evaluates, saves, and stops on SIGTERM or divergence."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from sparsecut_jax.data.pipeline import next_batch
from sparsecut_jax.data.walk import Bad
from sparsecut_jax.models.interfaces import Wiring
from sparsecut_jax.runs.checkpoint import Checkpoints, NotFinite
from sparsecut_jax.runtime import hosts
from sparsecut_jax.runtime.progress import Progress, Startup
from sparsecut_jax.settings import Config, StageConfig
from sparsecut_jax.training.report import MetricsWriter
from sparsecut_jax.training.step_log import HeldOut, StepLog
from sparsecut_jax.types import Batch, Exit, TrainState, UserError


@dataclasses.dataclass(frozen=True)
class StageSpan:
    """A stage and its optimizer steps first..last-1 of the run."""

    name: str
    stage: StageConfig
    first: int
    last: int


def stage_spans(cfg: Config, batches: dict[str, int]) -> list[StageSpan]:
    """The stages of a run, given the number of batches of each. Raises UserError if config.profile ends after them."""
    spans, first = [], 0
    for name in cfg.run_stages:
        spans.append(StageSpan(name, cfg.stages[name], first, first + batches[name]))
        first += batches[name]
    if cfg.profile and int(cfg.profile.split(":")[1]) > first:
        raise UserError(f"config.profile={cfg.profile!r} ends after the last of the run's {first} steps")
    return spans


class StopSignal:
    """Remembers a SIGTERM, so that the run can save at the next step boundary.

    In a multi-process run the signal may reach processes at different steps, or only one of them; there JAX handles it and
    finds a step that no process has reached yet.
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
    """Counts the programs compiled by this process, and how many of them came from the compilation cache."""

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
    """The inputs of a stage besides its train state.

    Attributes:
      span: the stage and its steps.
      step: the jitted training step.
      data: iterator of (Batch on the devices, bad rows found while reading it).
      note_bad: records bad rows; raises UserError above the limit.
      held_out: function of the parameters; None for no evaluation.
      flops: function from sequence length to the model FLOPs of a batch (planning/work.py).
      peak: peak FLOP/s of all devices, 0 if unknown.
      startup: notified when the first step of the process has ended.
      meta: the checkpoint's JSON beside its arrays.
      clock: seconds that the run has taken so far, earlier starts included.
      is_last: whether held-out losses are compared to find the best checkpoint.
      supervised: target tokens of earlier steps, if the stage is resumed.
    """

    span: StageSpan
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    data: Iterator[tuple[Batch, list[Bad]]]
    note_bad: Callable[[list[Bad]], None]
    held_out: Callable[[Any], HeldOut] | None
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
    wiring: Wiring,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    stop: StopSignal,
    compilations: Compilations,
) -> TrainState:
    """Trains from state.step to the end of the stage.

    Raises:
      Exit: 3 after SIGTERM, once everything is saved; 4 after step_log.BAD_UPDATES_IN_A_ROW updates without a finite
        loss and gradient, or when a parameter is not finite.
      UserError: a batch without target tokens although its rows are sound.
    """
    span, at = stage.span, int(state.step)
    window = [int(x) for x in cfg.profile.split(":")] if cfg.profile else [-1, -1]
    log = StepLog(
        cfg, stage, wiring, writer, compilations, Progress(span.last - span.first, at - span.first, span.name)
    )
    pending: tuple[int, dict[str, Any], int, int] | None = None  # a step, its metrics, its bad rows, positions of a row
    evaluated: dict[int, HeldOut] = {}
    tracing = False
    # CPU devices share a thread pool, in which two steps running at once could deadlock.
    one_at_a_time = jax.default_backend() == "cpu" and jax.device_count() > 1

    def evaluate(step: int) -> None:
        if stage.held_out is not None and step not in evaluated:
            first = (
                log.progress.busy("first evaluation on held-out rows") if not evaluated else contextlib.nullcontext()
            )
            with first:
                evaluated[step] = stage.held_out(state.params)
            log.held_out(step, evaluated[step])

    def save() -> None:
        step = int(state.step)
        loss = evaluated[step].loss if stage.is_last and step in evaluated else None
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
            # Metrics of the previous step are read only now, while this one runs, so the device never waits for the host.
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
                raise Exit(3, f"stopped by SIGTERM after saving step {at}; run the same command to resume")
    finally:
        if tracing:
            jax.profiler.stop_trace()
        log.close()
    return state
