"""Repeats the test figure of a run from its checkpoint.

python -m sparsecut_jax.evaluate --workdir=runs/base
python -m sparsecut_jax.evaluate --workdir=runs/base --checkpoint=best
"""

from __future__ import annotations

import json
import os

import jax
from absl import flags

from sparsecut_jax import cli, hosts
from sparsecut_jax.data.sources import Source
from sparsecut_jax.evaluation import vqa
from sparsecut_jax.inference.run import Run, load_run
from sparsecut_jax.training.report import Progress, table
from sparsecut_jax.types import UserError

SAMPLES = 12


def report_accuracy(run: Run, source: Source) -> dict[str, float | int]:
    """Answers all test rows, prints accuracy by kind and samples, writes every answer to answers.jsonl."""
    answered: list[vqa.Answered] = []
    results: dict[str, float | int] = {}
    for test, part in source.tests.items():
        progress, found, broken = Progress(len(part), 0, f"rows of {test}"), [], []
        for some in vqa.answer_part(run, part):
            found += some.answered
            broken += some.broken
            progress.update(some.rows)
        progress.close()
        if not found:
            raise UserError(f"none of the {len(part)} rows of {test} can be read: {broken[0]}")
        results |= print_accuracy(test, vqa.summarize(found, test))
        if broken:
            print(f"left out   {len(broken):,} of {len(part):,} broken rows of {test}; the first: {broken[0]}")
            results[f"{test}/broken_rows"] = len(broken)
        answered += found
    print()
    shown = vqa.samples(answered, SAMPLES)
    rows = [[a.question, a.expected, a.answer, "" if a.correct else "wrong"] for a in shown]
    print(table(["sample question", "expected", "answered", ""], rows), flush=True)
    if hosts.first():
        path = os.path.join(run.workdir, "answers.jsonl")
        with open(path + ".tmp", "w") as file:
            file.writelines(json.dumps(vars(item)) + "\n" for item in answered)
        os.replace(path + ".tmp", path)
    return results


def print_accuracy(test: str, results: dict[str, float | int]) -> dict[str, float | int]:
    print(f"\n{test}: every question asked alone, answered by generation, exact match")
    rows = []
    for key in (key for key in results if key.endswith("/accuracy")):
        group = key.removesuffix("/accuracy")
        name = group.removeprefix(test).strip("/") or "all"
        rows.append([name, f"{results[group + '/count']:,}", f"{results[key]:.2%}"])
    print(table(["kind", "questions", "accuracy"], rows))
    return results


def main() -> None:
    cli.need("--workdir=runs/base")
    run = load_run(FLAGS.workdir, FLAGS.checkpoint)
    print(f"{FLAGS.workdir}, step {run.step}, on {jax.device_count()} x {jax.devices()[0].device_kind}")
    with jax.set_mesh(run.mesh):
        report_accuracy(run, run.source())


FLAGS = flags.FLAGS


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    flags.DEFINE_string("workdir", "", "Workdir of a run.")
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step.")
    hosts.define_flags()
    cli.run(main, __doc__)


if __name__ == "__main__":
    run()
