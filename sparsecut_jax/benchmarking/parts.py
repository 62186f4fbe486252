"""The parts of a training step and of generation, each timed separately and compared with its floor (floors.py)."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparsecut_jax.benchmarking import floors, where
from sparsecut_jax.benchmarking.peaks import Peak, seconds
from sparsecut_jax.data import pipeline
from sparsecut_jax.data.batches import slots_of, spec_of
from sparsecut_jax.data.walk import stage_plan, walk
from sparsecut_jax.inference.decoding import encode_images, generate
from sparsecut_jax.models import ways
from sparsecut_jax.models.parameters import split
from sparsecut_jax.planning import generation
from sparsecut_jax.planning.compiling import step_of
from sparsecut_jax.runs import setup
from sparsecut_jax.runs.parameters import init_params
from sparsecut_jax.runtime import sharding
from sparsecut_jax.runtime.hardware import peak_flops
from sparsecut_jax.settings import Config
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state
from sparsecut_jax.training.step import make_gradients
from sparsecut_jax.types import Batch, empty_batch

PARTS = ("tower", "encode", "forward", "gradient", "step", "prefill", "decode", "input")
GROUP = 8  # batches timed together, more than the read-ahead holds


@dataclasses.dataclass(frozen=True)
class Timed:
    """One timed part.

    Attributes:
      part: its name in PARTS; label: its name in tables.
      seconds: times of all calls but the first.
      first: time of the first call, with tracing and compilation; 0 if nothing is compiled.
      flops, bytes: work and traffic of the floor; 0 if there is none.
      floor: the floor in seconds; bound: what sets it, "compute" or "memory".
      rate: throughput as text, for example "12,000 positions/s".
      where: where the time goes (where.py); empty without --trace.
    """

    part: str
    label: str
    seconds: list[float]
    first: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    floor: float = 0.0
    bound: str = ""
    rate: str = ""
    where: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def disturbed(self) -> bool:
        """Whether a call took less than the floor: then the peak rates were measured too low."""
        return self.floor > self.best

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self), "median": self.median, "best": self.best, "disturbed": self.disturbed,
        }  # fmt: skip


def drawn_batch(cfg: Config, name: str, slots: int) -> Batch:
    """A random batch of stage `name`: a few tokens, `slots` images in a row, then text, half of it target tokens."""
    stage, n, rng = cfg.stages[name], ways.positions(cfg), np.random.default_rng(0)
    batch = empty_batch(spec_of(cfg, stage.batch_size, stage.seq_len, slots, most_segments=1))
    t = stage.seq_len
    start = np.arange(slots, dtype=np.int32) * n + min(4, t - slots * n)
    batch.loss_mask[:, (t + int(start[-1]) + n) // 2 :] = 1
    batch.segments[:] = 1
    batch.positions[:] = np.arange(t)
    batch.image_start[:] = start
    tokens = rng.integers(3, cfg.llm.vocab_size, batch.tokens.shape, np.int32)
    return batch.replace(tokens=tokens, views=rng.integers(0, 256, batch.views.shape, np.uint8))


class Bench:
    """A stage of a config with random weights and a random batch, on this machine's devices."""

    def __init__(self, cfg: Config, name: str, steps: int, new: int, trace: bool = False):
        """Raises UserError as a run would.

        Args:
          cfg, name: the config and its stage.
          steps: timed calls per part.
          new: tokens to generate in decode.
          trace: also trace where the time goes.
        """
        self.opened = setup.open_here(cfg, name)
        self.notes, cfg = self.opened.notes, self.opened.config
        self.asked, self.name, self.steps, self.new, self.trace = cfg, name, steps, new, trace
        self.mesh = setup.mesh_of(cfg)
        setup.check_mesh(cfg, self.mesh.shape)
        self.shaped = setup.shape(cfg, self.mesh)
        self.cfg = cfg = self.shaped.config
        self.model, self.shapes = self.shaped.model, self.shaped.shapes
        self.stage, self.dtype = cfg.stages[name], self.model.dtype
        self.device = self.mesh.devices.flat[0].device_kind
        # As many images as fit into the sequence, at most the number of slots, at least one.
        self.slots = max(1, min(slots_of(cfg, name), self.stage.seq_len // max(1, ways.positions(cfg))))
        with jax.set_mesh(self.mesh):
            batch = drawn_batch(cfg, name, self.slots)
            self.predicted = float(batch.loss_mask.mean())  # share of target positions
            self.batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))

    @functools.cached_property
    def params(self) -> Any:
        return self._drawn_params()

    def _drawn_params(self) -> Any:
        return init_params(self.model, self.cfg, self.shaped.abstract_at(self.name))

    def time(self, part: str, peak: Peak) -> Timed:
        """Times one of PARTS."""
        with jax.set_mesh(self.mesh):
            timed = getattr(self, f"_{part}")()
        compute, memory = timed.flops / peak.flops, timed.bytes / peak.bandwidth
        bound = ("compute" if compute >= memory else "memory") if compute else ""
        return dataclasses.replace(timed, floor=max(compute, memory), bound=bound)

    # ------------------------------------------------------------------------------------------------------------------
    # a training step and its parts

    def _tower(self) -> Timed:
        run = jax.jit(lambda params, views: self.model.apply({"params": params}, views, method="levels"))
        return self._called("tower", "tower forward", run, self.params, self.batch.views)

    def _encode(self) -> Timed:
        run = jax.jit(
            lambda params, batch: self.model.apply(
                {"params": params}, batch.views, batch.extras.get("question"), method="encode"
            )
        )
        return self._called("encode", "tower and fusion forward", run, self.params, self.batch)

    def _forward(self) -> Timed:
        run = jax.jit(
            lambda params, batch: self.model.apply({"params": params}, batch, self.cfg.loss_chunk, method="loss")[0]
        )
        return self._called("forward", "forward to the loss", run, self.params, self.batch)

    def _gradient(self) -> Timed:
        run = jax.jit(make_gradients(self.model, self.shaped.matrices, self.stage.accumulate, self.cfg.loss_chunk))
        moving, frozen = split(self.params, self.stage.trainable)
        return self._called("gradient", "forward and backward", run, moving, frozen, self.batch, jax.random.key(0))

    def _step(self) -> Timed:
        step, target = step_of(self.shaped, self.name)
        # Its own parameters, which are donated: if only the step is timed, the memory is that of a run.
        now = state.begin_stage(
            target, self._drawn_params(), self.stage.trainable, opt.adamw(self.stage, self.shaped.matrices), 0, 0
        )

        def run(batch: Batch) -> Any:
            nonlocal now
            now, metrics = step(now, batch)
            return now, metrics

        return self._called("step", "training step", run, self.batch, program=lambda: step.lower(now, self.batch))

    def _called(self, part: str, label: str, run: Callable, *args: Any, program: Callable | None = None) -> Timed:
        """Times run(*args). program: returns the lowered program; default: `run` lowered for `args`."""
        first, *others = seconds(self.steps, run, *args)
        rows = []
        if self.trace:
            operations = where.shares(where.traced(run, *args))
            rows = where.summary(*operations, (program or functools.partial(run.lower, *args))().compile().as_text())
        return self._floored(Timed(part, label, others, first, where=rows))

    def _with_mfu(self, rate: str, flops: float, times: list[float]) -> str:
        peak = self.mesh.size * peak_flops(self.device)
        return f"{rate}, {flops / statistics.median(times) / peak:.1%} MFU" if peak else rate

    def _floored(self, timed: Timed) -> Timed:
        """`timed` with the FLOPs and bytes of the whole batch, and the rate."""
        cfg = self.cfg.with_stage(self.name, slots=self.slots)
        moving, _ = split(self.shaped.abstract_at(self.name), self.stage.trainable)
        trained = sum(math.prod(leaf.shape) for leaf in moving.values())
        floor = floors.of_training(cfg, self.name, self.shapes, timed.part, self.predicted, trained)
        tokens = self.stage.batch_size * self.stage.seq_len / timed.median
        images = f"{self._images / timed.median:,.1f} images/s"
        rate = images if timed.part in floors.OF else f"{tokens:,.0f} positions/s"
        rate = self._with_mfu(rate, floor.model, timed.seconds)
        return dataclasses.replace(timed, flops=floor.flops, bytes=floor.bytes, rate=rate)

    @property
    def _images(self) -> int:
        return self.stage.batch_size * self.slots

    # ------------------------------------------------------------------------------------------------------------------
    # generation

    @functools.cached_property
    def _answers(self) -> dict[int, list[float]]:
        """{new tokens: seconds per call} for answers of one token and of `new`, with one row per data-parallel group."""
        model, rows = setup.shape_for_inference(self.asked, self.mesh).model, sharding.data_parallel()
        params = jax.tree.map(lambda x: x.astype(self.dtype), self.params)
        row = jax.tree.map(lambda x: np.asarray(x)[:rows], self.batch)
        encoded = encode_images(model, params, row.views, row.extras.get("question"))
        length = np.full(rows, self.stage.seq_len, np.int32)
        run = lambda new: generate(model, params, row.tokens, length, row.image_start, encoded, new)
        return {new: seconds(self.steps, run, new) for new in (1, self.new)}

    def _prefill(self) -> Timed:
        first, *others = self._answers[1]
        rows = sharding.data_parallel()
        floor = floors.of_prefill(self.cfg, self.name, self.shapes, rows)
        rate = f"{rows * self.stage.seq_len / statistics.median(others):,.0f} positions/s"
        rate = self._with_mfu(rate, floor.model, others)
        return Timed("prefill", "prefill and one token", others, first, floor.flops, floor.bytes, rate=rate)

    def _decode(self) -> Timed:
        """Time per token: that of whole answers minus that of their first token, over the other tokens."""
        first, *others = self._answers[self.new]
        prefill, rows = statistics.median(self._answers[1][1:]), sharding.data_parallel()
        each = [max(0.0, s - prefill) / (self.new - 1) for s in others]
        if not statistics.median(each):  # an answer took no longer than its first token
            return Timed("decode", "decode, per token", each, first, rate="too short to measure; set a larger --new")
        prompts = jax.tree.map(lambda x: x[:rows], self.batch)
        cache = generation.cache_of(self.model, self.shaped.abstract(), prompts, self.new)
        floor = floors.of_decode(self.model, self.shapes, cache)
        rate = f"{rows / statistics.median(each):,.1f} tokens/s"
        return Timed("decode", "decode, per token", each, first, floor.flops, floor.bytes, rate=rate)

    # ------------------------------------------------------------------------------------------------------------------
    # input

    @functools.cached_property
    def data(self) -> tuple[Any, Any]:
        """Reader and batch plan of the config's data, as in a run. Raises UserError if the data cannot be read."""
        reader = setup.open_data(self.opened).reader(self.name)
        reader.pictures.forget = True
        stage = dataclasses.replace(self.stage, max_steps=GROUP * (self.steps + 1))
        return reader, stage_plan(self.name, walk(reader.split, reader.encode), reader.split, stage, self.asked)

    def _input(self) -> Timed:
        """Time per batch with nothing else running, in groups of batches because some are already read ahead."""
        batches = pipeline.train_batches(*self.data, self.asked, (self.asked.seed, 0))
        group = lambda: [pipeline.next_batch(batches) for _ in range(GROUP)] and None
        with pipeline.closing(batches):
            others = [s / GROUP for s in seconds(self.steps, group)[1:]]
        rate = f"{self.stage.batch_size / statistics.median(others):,.1f} sequences/s"
        return Timed("input", "input, per batch", others, rate=rate)

    # ------------------------------------------------------------------------------------------------------------------

    def peak_memory(self) -> int:
        """Peak bytes of a device, or of the whole process if the devices do not report it."""
        stats = self.mesh.devices.flat[0].memory_stats() or {}
        unit = 1 if sys.platform == "darwin" else 1024
        return stats.get("peak_bytes_in_use", 0) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def facts(self) -> dict[str, Any]:
        s = self.stage
        return {
            "stage": self.name, "device": self.device, "devices": self.mesh.size, "mesh": dict(self.mesh.shape),
            "dtype": str(self.dtype), "attention": self.cfg.attention, "batch_size": s.batch_size,
            "seq_len": s.seq_len, "images": self.slots, "new_tokens": self.new, "jax": jax.__version__,
        }  # fmt: skip
