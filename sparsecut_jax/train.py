"""Trains a model, evaluates it, and leaves everything in the workdir.

    python -m sparsecut_jax.train --config=configs/base.py
    python -m sparsecut_jax.train --config=configs/base.py:smoke
    python -m sparsecut_jax.train --config=configs/base.py --config.workdir=runs/mine --config.llm.layers=12

Where the workdir has a checkpoint the run goes on from it. Exit codes: 2 something to mend, 3 stopped by
SIGTERM after saving, 4 diverged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time

import jax
import numpy as np
from jax.sharding import Mesh

from sparsecut_jax import cli, sharding
from sparsecut_jax import config as config_lib
from sparsecut_jax.data import pipeline, sources
from sparsecut_jax.data import tokenizer as tokenizer_lib
from sparsecut_jax.evaluate import report_accuracy
from sparsecut_jax.inference.run import Run, compute_dtype
from sparsecut_jax.models.sparsecut import SparseCut, build_model
from sparsecut_jax.settings import Config, StageConfig
from sparsecut_jax.training import loop, plots, report, state
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training.checkpoint import Checkpoints, check_resumable, check_same_data
from sparsecut_jax.training.losses import cross_entropy
from sparsecut_jax.training.step import make_train_step
from sparsecut_jax.training.workdir import locked, print_written, read_results, write_json, write_run_files
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import pretrained as weights


def train(cfg: Config) -> dict[str, float]:
    """Runs the whole config; returns what results.json holds. Raises UserError if the workdir is in use."""
    with locked(cfg.workdir):
        return run_stages(cfg)


def run_stages(cfg: Config) -> dict[str, float]:
    """`train` in a workdir that nobody else writes to."""
    began = time.monotonic()

    # ------------------------------------------------------------------ devices
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh))
    dtype = compute_dtype(cfg, mesh)

    # ------------------------------------------------------------------ where the run stands
    asked = cfg
    checkpoints = Checkpoints(cfg.workdir, cfg.checkpoint.keep)
    resumed = checkpoints.latest
    meta = checkpoints.meta(resumed) if resumed is not None else None
    if meta is not None:
        check_resumable(meta, asked, cfg.workdir)
    earlier = meta["seconds"] if meta else 0.0
    clock = lambda: earlier + time.monotonic() - began

    # ------------------------------------------------------------------ pretrained parts
    parts = weights.open_sources(cfg.init) if meta is None else {}
    cfg = weights.resolve(cfg, parts) if meta is None else as_saved(cfg, meta["config"])
    config_lib.check_room(cfg)
    check_mesh(cfg, mesh)

    # ------------------------------------------------------------------ data
    source = sources.load_source(cfg.data)
    fingerprint = source.fingerprint()
    if meta is not None:
        check_same_data(meta["data"], fingerprint, cfg)
    tokenizer = tokenizer_lib.from_json(meta["tokenizer"]) if meta else make_tokenizer(cfg, source, parts)
    cfg = tokenizer_lib.with_vocabulary(cfg, tokenizer)
    pictures = pipeline.Images(cfg)
    rows = {name: fitting_rows(source, cfg.stages[name], cfg, tokenizer) for name in cfg.run_stages}
    spans = loop.plan_stages(cfg, {name: len(split.rows) for name, split in rows.items()})

    # ------------------------------------------------------------------ model
    model = build_model(cfg, dtype, ("shortcut_ratio",))
    abstract = state.abstract_params(model, cfg, mesh)
    trained = {s.name: opt.part_sizes(opt.split(abstract, s.stage.trainable)[0]) for s in spans}
    print(report.heading(mesh, model.plan, abstract, trained, dtype), flush=True)
    print_data(source, spans, rows)

    # ------------------------------------------------------------------ stages
    compilations, stop = loop.Compilations(), loop.StopSignal()
    with contextlib.closing(checkpoints), jax.set_mesh(mesh):
        params, step, skipped = None, resumed or 0, 0
        if resumed is None:
            params, told = state.initial_params(model, cfg, abstract, parts)
            if parts:
                print(told)
            if cfg.init_from:
                params, told = state.init_from(cfg.init_from, cfg.init_parts, params)
                print(told)
        else:
            print(f"resuming {cfg.workdir} at step {resumed} of {spans[-1].last}, in stage {meta['stage']}")
        write_run_files(cfg.workdir, cfg, tokenizer, model.plan)
        writer = report.MetricsWriter(cfg.workdir, step)
        names = [span.name for span in spans]
        for span in spans[names.index(meta["stage"]) if meta else 0 :]:
            tx = opt.adamw(span.stage)
            target = state.abstract_state(abstract, span.stage.trainable, tx, mesh)
            data = pipeline.train_batches(
                rows[span.name], span.stage, cfg, tokenizer, pictures, jax.process_index(), jax.process_count()
            )
            if params is None:
                current = checkpoints.restore_state(resumed, target)
                checkpoints.restore_data(resumed, data)
            else:
                current = state.begin_stage(target, params, span.stage.trainable, tx, step, skipped)
            step_fn = make_train_step(
                model, span.stage.trainable, tx, opt.schedule(span.stage, span.last - span.first),
                span.first, span.stage.accumulate, cfg.seed,
            )  # fmt: skip
            stage = loop.Stage(
                span=span,
                step=jax.jit(step_fn, donate_argnums=0),
                data=data,
                holdout_loss=make_holdout_loss(model, source, span.stage, cfg, tokenizer, pictures, mesh),
                meta={
                    "stage": span.name,
                    "asked": json.loads(config_lib.to_json(asked)),
                    "config": json.loads(config_lib.to_json(cfg)),
                    "tokenizer": tokenizer.to_json(),
                    "data": fingerprint,
                },
                clock=clock,
                is_last=span is spans[-1],
            )
            if step < span.last:
                current = loop.run_stage(stage, current, cfg, model.plan, mesh, checkpoints, writer, stop, compilations)
            params, step, skipped = current.params, int(current.step), int(current.skipped)
        writer.close()
        stop.restore()
        if stop.asked:
            raise cli.Exit(3, f"stopped by SIGTERM; step {step} is saved, and the same command goes on to the test")

        # -------------------------------------------------------------- results
        plots.save_loss(os.path.join(cfg.workdir, "loss.png"), report.read_metrics(cfg.workdir))
        results = {"step": step, "skipped_updates": skipped}
        if cfg.eval.test and source.test.rows:
            run = Run(cfg.workdir, step, cfg, mesh, build_model(cfg, dtype), params, tokenizer, pictures)
            results |= report_accuracy(run, source)
    results["seconds"] = clock()
    path = os.path.join(cfg.workdir, "results.json")
    write_json(path, {**read_results(path, step), **results})
    print_written(cfg.workdir, results["seconds"])
    return results


def check_mesh(cfg: Config, mesh: Mesh) -> None:
    """Raises UserError for a mesh that does not fit heads, widths or batches."""
    tensor, ways = mesh.shape["tensor"], sharding.data_parallel(mesh)
    for key, value in {
        "vision.heads": cfg.vision.heads,
        "vision.mlp_dim": cfg.vision.mlp_dim,
        "llm.heads": cfg.llm.heads,
        "llm.kv_heads": cfg.llm.kv_heads,
        "llm.mlp_dim": cfg.llm.mlp_dim,
    }.items():
        if value % tensor:
            raise UserError(f"config.{key}={value} cannot be split over mesh axis tensor={tensor}")
    batches = {
        f"stages.{n}.batch_size / accumulate": cfg.stages[n].batch_size // cfg.stages[n].accumulate
        for n in cfg.run_stages
    }
    for key, value in batches.items():
        if value % ways:
            raise UserError(
                f"config.{key} = {value} rows cannot be split over the {ways} devices of mesh axes data x fsdp; "
                f"choose a multiple of {ways}"
            )


def as_saved(cfg: Config, saved: dict) -> Config:
    """The config of a resumed run, with the sizes that its pretrained parts gave it at the start."""
    old = config_lib.check(saved)
    data = dataclasses.replace(cfg.data, image_fit=old.data.image_fit)
    return dataclasses.replace(
        cfg, vision=old.vision, fusion=old.fusion, shortcuts=old.shortcuts, llm=old.llm, data=data
    )


def make_tokenizer(cfg: Config, source: sources.Source, parts: dict[str, weights.Source]) -> tokenizer_lib.Tokenizer:
    """The LLM's, config.tokenizer's, or for an LLM that starts from nothing one trained on the rows."""
    tokenizer = weights.source_tokenizer(cfg, parts)
    if tokenizer is None and "llm" in parts:
        raise UserError(
            f"{parts['llm'].path} holds no tokenizer; give config.tokenizer.path, a folder that has the LLM's"
        )
    return tokenizer or tokenizer_lib.train(source.texts(), cfg.tokenizer.vocab_size)


def fitting_rows(source: sources.Source, stage: StageConfig, cfg: Config, tokenizer) -> sources.Split:
    """Training rows of a stage without those whose image and first answer do not fit; says which were left out."""
    split = source.stage_rows(stage.rows)
    kept, dropped = pipeline.fitting(split.rows, stage, cfg, tokenizer)
    if not kept:
        raise UserError(f"none of the {len(dropped)} rows fits: {dropped[0]}")
    if dropped:
        print(f"left out   {len(dropped):,} of {len(split.rows):,} rows that do not fit; the first: {dropped[0]}")
    return sources.Split(kept, split.images)


def make_holdout_loss(
    model: SparseCut, source: sources.Source, stage: StageConfig, cfg: Config, tokenizer, pictures, mesh: Mesh
):
    """Function of the parameters: mean loss over the held-out rows. None if there are none."""
    if not source.holdout.rows or not cfg.eval.every:
        return None
    split = source.stage_rows(stage.rows, source.holdout)
    split = sources.Split(pipeline.fitting(split.rows, stage, cfg, tokenizer)[0], split.images)
    if not split.rows:
        return None
    batches = pipeline.fixed_batches(split, stage, cfg, tokenizer, pictures)
    placed = sharding.batch_sharding(mesh)

    @jax.jit
    def sums(params, batch):
        return cross_entropy(model.apply({"params": params}, batch)[0], batch)

    def holdout_loss(params) -> float:
        found = np.array([jax.device_get(sums(params, jax.device_put(batch, placed))) for batch in batches])
        return float(found[:, 0].sum() / found[:, 1].sum())

    return holdout_loss


def print_data(source: sources.Source, spans: list[loop.StageSpan], rows: dict[str, sources.Split]) -> None:
    print(f"\ndata       {source.name}: {len(source.train.rows):,} rows, {len(source.holdout.rows):,} held out, "
          f"{len(source.test.rows):,} to test")  # fmt: skip
    for s in spans:
        print(f"stage      {s.name}: {s.last - s.first:,} steps of {s.stage.batch_size} rows, {s.stage.rows} "
              f"({len(rows[s.name].rows):,} rows), lr {s.stage.lr:g}")  # fmt: skip
    print(flush=True)


if __name__ == "__main__":
    cli.define_config()
    cli.run(lambda: train(cli.typed_config()), __doc__, resumes=True)
