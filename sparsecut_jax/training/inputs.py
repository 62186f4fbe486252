"""What training reads: the batches of its stages, from a batch plan of their rows, and the held-out rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from sparsecut_jax.data import pipeline, sources
from sparsecut_jax.data.batch_plan import BatchPlan
from sparsecut_jax.data.walk import FEW, stage_plan, walk_once
from sparsecut_jax.models.losses import right_answers
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime import hosts, placing, sharding
from sparsecut_jax.runtime.progress import Progress
from sparsecut_jax.settings import Config
from sparsecut_jax.training import loop
from sparsecut_jax.training.bad_samples import BadSamples
from sparsecut_jax.training.step_log import HeldOut


def make_stage_plan(name: str, reader: pipeline.Reader, data: setup.Data, bad_samples: BadSamples) -> BatchPlan:
    """Reads the lengths of a stage's rows and plans its batches. Raises UserError if too many are broken or none fits."""
    cfg = data.config
    split = reader.split
    progress = Progress(len(split), 0, f"rows of {name}") if len(split) > FEW else None
    file = os.path.join(cfg.workdir, f"rows-{name}.npz")
    update = progress.update if progress else lambda n: None
    with hosts.in_turn(f"rows {name}"):  # the others use the file that process 0 wrote
        walked = walk_once(file, split, reader.encode, data.source.fingerprint, update)
    if progress:
        progress.close()
    bad_samples.add(name, walked.bad, len(split), write=hosts.first())
    bad_samples.cut[name] = walked.cut_counts
    return stage_plan(name, walked, split, cfg.stages[name], cfg)


def batches_of(
    reader: pipeline.Reader, plan: BatchPlan, cfg: Config, span: loop.StageSpan, step: int, mesh: Mesh
) -> grain.DatasetIterator:
    """Iterator of (Batch on the devices, bad rows) of a stage, from optimizer step `step` of the run on."""
    count, placed = span.stage.batch_size, sharding.batch_sharding(mesh)
    rows = placing.rows_here(placed, count)
    place = functools.partial(placing.place, placed=placed, rows=rows, count=count)
    return pipeline.train_batches(reader, plan, cfg, (cfg.seed, span.first), step - span.first, rows, place)


def make_held_out(
    model: SparseCut, data: setup.Data, name: str, cfg: Config, mesh: Mesh
) -> Callable[[Any], HeldOut] | None:
    """Function from parameters to what they reach on the held-out rows; None if there are none."""
    if not cfg.eval.every or not any(map(len, data.source.holdout.values())):
        return None
    stage = cfg.stages[name]
    reader = data.reader(name, holdout=True)
    size, placed = stage.batch_size // stage.accumulate, sharding.batch_sharding(mesh)
    here = placing.rows_here(placed, size)
    batches = list(pipeline.fixed_batches(reader, size, stage.seq_len, cfg.data.max_images, here))
    if not placing.gather(np.array([batch.loss_mask.any() for batch in batches])).any():
        return None

    @jax.jit
    def sums(params, batch):
        total, count, seen = model.apply({"params": params}, batch, cfg.loss_chunk, method="loss")
        right = right_answers(*seen["words"], batch, cfg.loss_chunk) if "words" in seen else ()
        return total, count, *right

    def held_out(params) -> HeldOut:
        on_devices = (placing.place(batch, placed, here, size) for batch in batches)
        totals = np.array([jax.device_get(sums(params, batch)) for batch in on_devices]).sum(0)
        return HeldOut(float(totals[0] / totals[1]), float(totals[2] / totals[3]) if len(totals) > 2 else None)

    return held_out


def print_data(
    source: sources.Source, spans: list[loop.StageSpan], plans: dict[str, BatchPlan], bad_samples: BadSamples
) -> None:
    counts = [sum(map(len, parts.values())) for parts in (source.train, source.holdout, source.tests)]
    print(f"\ndata       {source.name}: {counts[0]:,} rows, {counts[1]:,} held out, {counts[2]:,} test rows")
    for s in spans:
        plan = plans[s.name]
        rates = "".join(f", of {pattern} {rate:g}" for pattern, rate in s.stage.lr_of.items())
        print(f"stage      {s.name}: {s.last - s.first:,} steps of {s.stage.batch_size} sequences, {s.stage.rows} "
              f"{s.stage.batching}, {plan.useful:.0%} non-padding tokens, lr {s.stage.lr:g}{rates}")  # fmt: skip
    if counted := bad_samples.counts():
        listing = ", ".join(f"{count:,} {cause}" for cause, count in counted.items())
        print(f"skipped    {listing}: {bad_samples.path}")
    for s in spans:
        answers, rows = bad_samples.cut[s.name]
        if answers:
            print(f"cut        {s.name}: {answers:,} answers, of {rows:,} rows, do not fit into seq_len={s.stage.seq_len} and "
                  "are dropped")  # fmt: skip
    print(flush=True)
