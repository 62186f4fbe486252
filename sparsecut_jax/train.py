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
import functools
import os
import time

import jax

from sparsecut_jax.commandline import cli
from sparsecut_jax.data import pipeline, sources
from sparsecut_jax.evaluation import testing
from sparsecut_jax.evaluation.accuracy import report_accuracy
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.planning import work
from sparsecut_jax.runs import setup
from sparsecut_jax.runs.checkpoint import Checkpoints, check_resumable, meta_of
from sparsecut_jax.runs.features import check_frozen, with_features
from sparsecut_jax.runs.level_norm import with_level_norm
from sparsecut_jax.runs.origin import Origin
from sparsecut_jax.runs.parameters import initial_params
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runs.workdir import locked, print_written, update_results, write_run_files
from sparsecut_jax.runtime import backends, hardware, hosts, sharding
from sparsecut_jax.runtime.progress import Startup
from sparsecut_jax.settings import Config
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.training import inputs, loop, report, state
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training.bad_samples import BadSamples
from sparsecut_jax.training.step import make_train_step
from sparsecut_jax.types import Exit
from sparsecut_jax.weights import load


def train(cfg: Config) -> dict[str, float]:
    """Runs the whole config; returns what results.json holds. Raises UserError if the workdir is in use."""
    with locked(cfg.workdir):
        return run_stages(cfg)


def run_stages(cfg: Config) -> dict[str, float]:
    """`train` in a workdir that is already locked."""
    began, startup = time.monotonic(), Startup()
    startup.done("imports")

    # ------------------------------------------------------------------ devices
    mesh = setup.mesh_of(cfg)
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
        loop.stage_spans(cfg, steps)  # a profile behind the last step; where epochs count, the rows decide that below
    earlier = meta["seconds"] if meta else 0.0
    clock = lambda: earlier + time.monotonic() - began

    # ------------------------------------------------------------------ pretrained parts
    opened = setup.open_weights(cfg) if meta is None else setup.reopen(cfg, meta)
    setup.check_fits(opened.config, mesh)
    if origin:
        origin.check_settings(opened.config)

    # ------------------------------------------------------------------ data, no row of which is read but for a tokenizer
    startup.done("devices")
    data = setup.open_data(opened, meta)
    cfg = tokenizer_lib.with_vocabulary(opened.config, data.tokenizer)
    setup.check_mesh(cfg, mesh.shape)  # again: now the vocabulary is known
    readers = data.readers  # of all stages; refuses a template that the tokenizer does not support

    # ------------------------------------------------------------------ shapes, against all that must fit them
    startup.done("data")
    shaped = setup.shape(cfg, mesh)
    abstract = shaped.abstract_at(meta["stage"] if meta else cfg.run_stages[0])
    for name in cfg.run_stages:
        opt.checked_rates(shaped.shapes, cfg.stages[name], name)
    if cfg.data.cache_features != "none":
        check_frozen(cfg, list(shaped.shapes))
    matched = load.match(abstract, cfg, opened.weight_sources)
    if origin:
        origin.target(cfg, flatten(abstract))  # refuses other shapes
        origin.run.close()

    # ------------------------------------------------------------------ rows
    startup.done("shapes")
    bad_samples = BadSamples(cfg.workdir, cfg.data.max_bad_fraction, hosts.index(), fresh=meta is None)
    plans = {name: inputs.make_stage_plan(name, reader, data, bad_samples) for name, reader in readers.items()}
    spans = loop.stage_spans(cfg, {name: len(plan) for name, plan in plans.items()})

    # ------------------------------------------------------------------ model
    startup.done("rows")
    shaped = setup.shape(cfg, mesh, branched=any(plan.branched for plan in plans.values()))
    model, are_matrices, dtype = shaped.model, shaped.matrices, shaped.model.dtype
    txs = {span.name: opt.adamw(span.stage, are_matrices) for span in spans}
    states = {
        span.name: state.abstract_state(shaped.abstract_at(span.name), span.stage.trainable, txs[span.name], mesh)
        for span in spans
    }
    print(report.heading(mesh, model.wiring, abstract, states, dtype), flush=True)
    inputs.print_data(data.source, spans, plans, bad_samples)

    # ------------------------------------------------------------------ stages
    compilations, stop = loop.Compilations(), loop.StopSignal()
    with contextlib.closing(checkpoints), jax.set_mesh(mesh):
        params, step, skipped = None, resumed or 0, 0
        if resumed is None:
            params, came_from = initial_params(model, cfg, abstract, matched)
            if opened.weight_sources:
                print("\n".join([*opened.notes, str(came_from)]))
            if origin:
                params, came_from = Origin(cfg).load(cfg, params)  # opened anew: it may have trained on since
                print(came_from)
        else:
            print(f"resuming {cfg.workdir} at step {resumed} of {spans[-1].last}, in stage {meta['stage']}")
        if cfg.data.cache_features != "none":
            tower = params or checkpoints.restore_params(resumed, {"vision": abstract["vision"]})
            data = with_features(data, model, tower["vision"])
            readers = data.readers
        if cfg.fusion.norm_levels and params is not None:
            params = with_level_norm(params, model, data, mesh)
        if hosts.first():
            write_run_files(cfg.workdir, cfg, data.tokenizer, model.wiring)
        writer = report.MetricsWriter(cfg.workdir, step)
        names = [span.name for span in spans]
        startup.done("parameters")
        for span in spans[names.index(meta["stage"]) if meta else 0 :]:
            tx, target, plan = txs[span.name], states[span.name], plans[span.name]
            batches = inputs.batches_of(readers[span.name], plan, cfg, span, step, mesh)
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
                data=batches,
                note_bad=functools.partial(bad_samples.add, span.name, rows=len(readers[span.name].split)),
                held_out=inputs.make_held_out(model, data, span.name, cfg, mesh),
                meta=meta_of(span.name, asked, cfg, data.tokenizer, data.source.fingerprint),
                flops=work.flops_of_batch(shaped.config, span.name, shaped.shapes, plan.slots),
                peak=mesh.size * hardware.peak_flops(mesh.devices.flat[0].device_kind),
                startup=startup,
                clock=clock,
                is_last=span is spans[-1],
                supervised=meta["supervised_tokens"] if meta and meta["stage"] == span.name else 0,
            )
            if step < span.last:
                with pipeline.closing(batches):
                    current = loop.run_stage(stage, current, cfg, model.wiring, checkpoints, writer, stop, compilations)
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
        results["model"] = {
            "parameters": {part: report.count(tree) for part, tree in params.items()},
            "positions": model.wiring.positions,
            "flops_per_step": stage.flops(cfg.stages[spans[-1].name].seq_len),
        }
        results["cut_answers"] = {name: cut for name, (cut, _) in bad_samples.cut.items() if cut}
        if cfg.eval.test and data.source.tests:
            run = Run(
                cfg.workdir, step, cfg, mesh, model.clone(intermediates=()), params, data.tokenizer, data.pictures
            )
            results |= report_accuracy(run, data.source.tests, cfg.workdir)
        elif cfg.eval.test:
            print(f"not tested: {sources.NO_TESTS}", flush=True)
    results["seconds"] = clock()
    if hosts.first():
        update_results(cfg.workdir, step, results)
    rows = [*data.source.tests.values(), *data.source.train.values()]
    print_written(cfg.workdir, results["seconds"], *testing.example(rows))
    return results


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    cli.define_config()
    hosts.define_flags()
    cli.run(lambda: train(cli.typed_config()), __doc__, resumes=True)


if __name__ == "__main__":
    run()
