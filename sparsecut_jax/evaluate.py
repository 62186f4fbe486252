"""Repeats the test figure of a run from its checkpoint.

python -m sparsecut_jax.evaluate --workdir=runs/base
python -m sparsecut_jax.evaluate --workdir=runs/base --checkpoint=best
"""

from __future__ import annotations

import json
import os

import jax
from absl import flags

from sparsecut_jax import cli
from sparsecut_jax.data.sources import Source
from sparsecut_jax.evaluation import vqa
from sparsecut_jax.inference.run import Run, load_run
from sparsecut_jax.training.report import Progress, table
from sparsecut_jax.types import UserError

SAMPLES = 12


def report_accuracy(run: Run, source: Source) -> dict[str, float | int]:
    """Answers the whole test split, prints accuracy by kind and samples, writes every answer to answers.jsonl."""
    answered: list[vqa.Answered] = []
    progress = Progress(vqa.count_questions(source.test.rows), 0, "test")
    for chunk in vqa.answer_split(run, source.test):
        answered += chunk
        progress.update(len(chunk))
    progress.close()
    results = vqa.summarize(answered, source.test_name)
    print(f"\n{source.test_name}: every question asked alone, answered by generation, exact match")
    rows = []
    for key in (key for key in results if key.endswith("/accuracy")):
        group = key.removesuffix("/accuracy")
        name = group.removeprefix(source.test_name).strip("/") or "all"
        rows.append([name, f"{results[group + '/count']:,}", f"{results[key]:.2%}"])
    print(table(["kind", "questions", "accuracy"], rows))
    print()
    shown = vqa.samples(answered, SAMPLES)
    rows = [[a.question, a.expected, a.answer, "" if a.correct else "wrong"] for a in shown]
    print(table(["sample question", "expected", "answered", ""], rows), flush=True)
    path = os.path.join(run.workdir, "answers.jsonl")
    with open(path + ".tmp", "w") as file:
        file.writelines(json.dumps(vars(item)) + "\n" for item in answered)
    os.replace(path + ".tmp", path)
    return results


def main() -> None:
    if not FLAGS.workdir:
        raise UserError("--workdir is missing; for example --workdir=runs/base")
    run = load_run(FLAGS.workdir, FLAGS.checkpoint)
    print(f"{FLAGS.workdir}, step {run.step}, on {jax.device_count()} x {jax.devices()[0].device_kind}")
    with jax.set_mesh(run.mesh):
        report_accuracy(run, run.source())


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "Workdir of a run.")
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step.")
    cli.run(main, __doc__)
