"""Evaluates a run on its test rows, or on the rows of any file.

    python -m sparsecut_jax.evaluate --workdir=runs/base
    python -m sparsecut_jax.evaluate --workdir=runs/base --checkpoint=best
    python -m sparsecut_jax.evaluate --workdir=runs/base --data=rows.json --images=DIR

--data accepts whatever config.data.source accepts, for runs and converted weights. answers.jsonl and results.json are written
to the workdir or, for a checkpoint other than the latest, to workdir/step_N. A row may list other correct answers as
`answers`.
"""

from __future__ import annotations

import dataclasses
import os

import jax
from absl import flags

from sparsecut_jax.commandline import cli
from sparsecut_jax.data import sources
from sparsecut_jax.evaluation.accuracy import report_accuracy
from sparsecut_jax.inference.answering import check_template
from sparsecut_jax.runs.run import FRESH_FUSION, load_run
from sparsecut_jax.runs.workdir import update_results
from sparsecut_jax.runtime import hosts
from sparsecut_jax.runtime.folders import make_folder
from sparsecut_jax.types import UserError

FLAGS = flags.FLAGS


def main() -> None:
    cli.need("--workdir=runs/base")
    if FLAGS.images and not FLAGS.data:
        raise UserError(f"--images={FLAGS.images} has no effect without --data")
    if FLAGS.max_new_tokens is not None and not 0 <= FLAGS.max_new_tokens <= 100_000:
        raise UserError(f"--max_new_tokens={FLAGS.max_new_tokens}: expected 0 to 100,000")
    check_template(FLAGS.template, "--")
    run = load_run(FLAGS.workdir, FLAGS.checkpoint)
    cfg = run.config
    limit = 0 if FLAGS.data else cfg.eval.max_new_tokens  # the run's limit was set for its own test rows
    limit = limit if FLAGS.max_new_tokens is None else FLAGS.max_new_tokens
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, max_new_tokens=limit))
    if FLAGS.template:
        cfg = cfg.with_stage(cfg.run_stages[-1], template=FLAGS.template)
    if FLAGS.data:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, test=FLAGS.data, test_images=FLAGS.images))
    if FLAGS.follow_links is not None:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, follow_links=FLAGS.follow_links))
    run = dataclasses.replace(run, config=cfg)
    tests = sources.open_tests(cfg)
    if not tests:
        raise UserError(f"{FLAGS.workdir}: {sources.NO_TESTS}; --data=rows.json --images=DIR evaluates it on a file")
    folder = FLAGS.workdir if FLAGS.checkpoint == "latest" else os.path.join(FLAGS.workdir, f"step_{run.step}")
    make_folder("--workdir", folder)
    print(f"{FLAGS.workdir}, step {run.step}, on {jax.device_count()} x {jax.devices()[0].device_kind}")
    if run.fresh_fusion:
        print(f"note: {FRESH_FUSION.format(FLAGS.workdir)}")
    with jax.set_mesh(run.mesh):
        results = report_accuracy(run, tests, folder)
    if hosts.first():
        update_results(folder, run.step, results)
        print(f"\nwritten to {folder}: answers.jsonl, results.json")


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    flags.DEFINE_string("workdir", "", "Workdir of a run, or one written by `convert from-hf`.")
    flags.DEFINE_string("checkpoint", "latest", "Checkpoint: latest, best or a step.")
    flags.DEFINE_string("data", "", "Test rows: a file or any other source; default: those of the run.")
    flags.DEFINE_string("images", "", "Folder of the images of --data; default: config.data.images of the run.")
    flags.DEFINE_boolean(
        "follow_links",
        None,
        "Follow links that lead out of the folder of the images; left out: as the run was trained.",
    )
    flags.DEFINE_string("template", "", "Prompt template; default: the one the run was trained with.")
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        "Maximum answer length in tokens; 0: from the test answers; default: the run's, with --data 0.",
    )
    hosts.define_flags()
    cli.run(main, __doc__)


if __name__ == "__main__":
    run()
