"""Trains a model, evaluates it, and writes everything to the workdir.

    python -m sparsecut_jax.train --config=configs/base.py
    python -m sparsecut_jax.train --config=configs/base.py:smoke
    python -m sparsecut_jax.train --config=configs/base.py --config.workdir=runs/mine --config.llm.layers=12

If the workdir has a checkpoint, the run resumes from it. Exit codes: 0 done, 2 bad input (one sentence says what to fix),
3 stopped by SIGTERM after saving, 4 diverged, 5 another process of the run died.

For a multi-process run, start the same command in every process with
    --coordinator=HOST:PORT --processes=N --process=I      I = 0 to N-1; TPU slices and SLURM need no flags
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time

import jax

from sparsecut_jax import checks
from sparsecut_jax import config as config_lib
from sparsecut_jax.commandline import cli
from sparsecut_jax.data import pipeline, sources
from sparsecut_jax.evaluation import vqa
from sparsecut_jax.evaluation.accuracy import report_accuracy
from sparsecut_jax.models.parameters import flatten, matrices
from sparsecut_jax.models.shortcuts import plan_shortcuts
from sparsecut_jax.models.sparsecut import build_model
from sparsecut_jax.planning import flops, hardware
from sparsecut_jax.runs.checkpoint import Checkpoints, as_saved, check_resumable, check_same_data
from sparsecut_jax.runs.origin import Origin
from sparsecut_jax.runs.parameters import abstract_params, boxed_shapes, initial_params, stage_dtypes
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runs.setup import make_reader, make_tokenizer
from sparsecut_jax.runs.workdir import locked, print_written, update_results, write_run_files
from sparsecut_jax.runtime import backends, hosts, placing, sharding
from sparsecut_jax.runtime.progress import Startup
from sparsecut_jax.settings import Config
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.training import inputs, loop, report, state
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training.bad_samples import BadSamples
from sparsecut_jax.training.step import make_train_step
from sparsecut_jax.types import Exit
from sparsecut_jax.weights import load
from sparsecut_jax.weights import pretrained as weights
from sparsecut_jax.weights.claims import adopt, differences


def train(cfg: Config) -> dict[str, float]:
    """Runs the whole config; returns what results.json holds. Raises UserError if the workdir is in use."""
    with locked(cfg.workdir):
        return run_stages(cfg)


def run_stages(cfg: Config) -> dict[str, float]:
    """`train` in a workdir that is already locked."""
    began, startup = time.monotonic(), Startup()
    startup.done("imports")

    # ------------------------------------------------------------------ devices
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh))
    backends.resolve(cfg, sharding.platform(mesh))  # refuses unsupported settings before anything is written

    # ------------------------------------------------------------------ progress of the run
    asked = cfg
    checkpoints = Checkpoints(cfg.workdir, cfg.checkpoint.keep)
    resumed = checkpoints.latest
    meta = checkpoints.meta(resumed) if resumed is not None else None
    if meta is not None:
        check_resumable(meta, asked, cfg.workdir)
    origin = Origin(cfg) if meta is None and cfg.init_from else None
    steps = {name: cfg.stages[name].max_steps for name in cfg.run_stages}
    if all(steps.values()):
        loop.plan_stages(cfg, steps)  # a profile behind the last step; where epochs count, the rows decide that below
    earlier = meta["seconds"] if meta else 0.0
    clock = lambda: earlier + time.monotonic() - began

    # ------------------------------------------------------------------ pretrained parts
    parts = weights.open_sources(cfg.init) if meta is None else {}
    cfg = adopt(cfg, parts) if meta is None else as_saved(cfg, meta["config"])
    checks.check_room(cfg)
    sharding.check_mesh(cfg, mesh.shape)
    backends.resolve(cfg, sharding.platform(mesh))
    plan_shortcuts(cfg.shortcuts, cfg.vision.layers, cfg.llm.layers, cfg.vision.select_layer)
    if origin:
        origin.check_settings(cfg)

    # ------------------------------------------------------------------ data, no row of which is read but for a tokenizer
    startup.done("devices")
    source = sources.load_source(cfg)
    if meta is not None:
        check_same_data(meta["data"], source.fingerprint, cfg)
    tokenizer = tokenizer_lib.from_json(meta["tokenizer"]) if meta else make_tokenizer(cfg, source, parts)
    cfg = tokenizer_lib.with_vocabulary(cfg, tokenizer)
    sharding.check_mesh(cfg, mesh.shape)  # again: now the vocabulary is known
    pictures = pipeline.Images(cfg)
    readers = {name: make_reader(source, name, cfg, tokenizer, pictures) for name in cfg.run_stages}

    # ------------------------------------------------------------------ shapes, against all that must fit them
    startup.done("data")
    here = backends.resolve(cfg, sharding.platform(mesh))
    dtype = backends.compute_dtype(here)
    shaped = build_model(here, dtype, ("shortcut_ratio",))
    are_matrices = matrices(boxed_shapes(shaped, cfg.data.max_images))
    abstract_of = lambda name: abstract_params(shaped, cfg, mesh, stage_dtypes(here, name, are_matrices))
    abstract = abstract_of(meta["stage"] if meta else cfg.run_stages[0])
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    for name in cfg.run_stages:
        opt.checked_rates(shapes, cfg.stages[name], name)
    matched = load.match(abstract, cfg, parts)
    if origin:
        origin.target(cfg, flatten(abstract))  # refuses other shapes
        origin.run.close()

    # ------------------------------------------------------------------ rows
    startup.done("shapes")
    bad_samples = BadSamples(cfg.workdir, cfg.data.max_bad_fraction, hosts.index(), fresh=meta is None)
    plans = {name: inputs.make_stage_plan(name, reader, cfg, source, bad_samples) for name, reader in readers.items()}
    spans = loop.plan_stages(cfg, {name: len(plan) for name, plan in plans.items()})

    # ------------------------------------------------------------------ model
    startup.done("rows")
    branched = any(plan.branched for plan in plans.values())
    here = backends.resolve(cfg, sharding.platform(mesh), branched)  # checkpoints keep the unresolved config
    model = build_model(here, dtype, ("shortcut_ratio",))
    states = {
        s.name: state.abstract_state(abstract_of(s.name), s.stage.trainable, opt.adamw(s.stage, are_matrices), mesh)
        for s in spans
    }
    print(report.heading(mesh, model.plan, abstract, states, dtype), flush=True)
    inputs.print_data(source, spans, plans, bad_samples)

    # ------------------------------------------------------------------ stages
    compilations, stop = loop.Compilations(), loop.StopSignal()
    with contextlib.closing(checkpoints), jax.set_mesh(mesh):
        params, step, skipped = None, resumed or 0, 0
        if resumed is None:
            params, told = initial_params(model, cfg, abstract, matched)
            if parts:
                print("\n".join([*differences(asked, parts), str(told)]))
            if origin:
                params, told = Origin(cfg).load(cfg, params)  # opened anew: it may have trained on since
                print(told)
        else:
            print(f"resuming {cfg.workdir} at step {resumed} of {spans[-1].last}, in stage {meta['stage']}")
        if hosts.first():
            write_run_files(cfg.workdir, cfg, tokenizer, model.plan)
        writer = report.MetricsWriter(cfg.workdir, step)
        placed = sharding.batch_sharding(mesh)
        names = [span.name for span in spans]
        startup.done("parameters")
        for span in spans[names.index(meta["stage"]) if meta else 0 :]:
            tx = opt.adamw(span.stage, are_matrices)
            target = states[span.name]
            held = placing.rows_here(placed, span.stage.batch_size)
            data = pipeline.train_batches(
                readers[span.name], plans[span.name], cfg, (cfg.seed, span.first), step - span.first, held,
                functools.partial(placing.place, placed=placed, rows=held, count=span.stage.batch_size),
            )  # fmt: skip
            if params is None:
                current = checkpoints.restore_state(resumed, target)
            else:
                current = state.begin_stage(target, params, span.stage.trainable, tx, step, skipped)
            step_fn = make_train_step(
                model, are_matrices, span.stage, tx, opt.schedule(span.stage, span.last - span.first),
                span.first, cfg.seed, cfg.loss_chunk,
            )  # fmt: skip
            stage = loop.Stage(
                span=span,
                step=jax.jit(step_fn, donate_argnums=0, out_shardings=(None, sharding.replicated(mesh))),
                data=data,
                note_bad=functools.partial(bad_samples.add, span.name, rows=len(readers[span.name].split)),
                holdout_loss=inputs.make_holdout_loss(model, source, span.name, cfg, tokenizer, pictures, mesh),
                meta={
                    "stage": span.name,
                    "asked": json.loads(config_lib.to_json(asked)),
                    "config": json.loads(config_lib.to_json(cfg)),
                    "tokenizer": tokenizer.to_json(),
                    "data": source.fingerprint,
                },
                flops=flops.of_batch(here, span.name, shapes, plans[span.name].slots),
                peak=mesh.size * hardware.peak_flops(mesh.devices.flat[0].device_kind),
                startup=startup,
                clock=clock,
                is_last=span is spans[-1],
                supervised=meta["supervised_tokens"] if meta and meta["stage"] == span.name else 0,
            )
            if step < span.last:
                with pipeline.closing(data):
                    current = loop.run_stage(stage, current, cfg, model.plan, checkpoints, writer, stop, compilations)
            params, step, skipped = current.params, int(current.step), int(current.skipped)
        writer.close()
        stop.restore()
        if stop.asked(step + 1):
            raise Exit(3, f"stopped by SIGTERM; step {step} is saved; run the same command for the test")

        # -------------------------------------------------------------- results
        if hosts.first():
            from sparsecut_jax.training import plots  # here: matplotlib takes a third of a second

            plots.save_loss(os.path.join(cfg.workdir, "loss.png"), report.read_metrics(cfg.workdir))
        results = {"step": step, "skipped_updates": skipped, "bad_samples": bad_samples.counts()}
        results["cut_answers"] = {name: cut for name, (cut, _) in bad_samples.cut.items() if cut}
        if cfg.eval.test and source.tests:
            run = Run(cfg.workdir, step, cfg, mesh, build_model(here, dtype), params, tokenizer, pictures)
            results |= report_accuracy(run, source.tests, cfg.workdir)
        elif cfg.eval.test:
            print(f"not tested: {sources.NO_TESTS}", flush=True)
    results["seconds"] = clock()
    if hosts.first():
        update_results(cfg.workdir, step, results)
    print_written(cfg.workdir, results["seconds"], *vqa.example([*source.tests.values(), *source.train.values()]))
    return results


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    cli.define_config()
    hosts.define_flags()
    cli.run(lambda: train(cli.typed_config()), __doc__, resumes=True)


if __name__ == "__main__":
    run()
