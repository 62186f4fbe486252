"""Compares finished runs: settings that differ, scores with paired intervals, loss curves, and answers with their images.

    python -m sparsecut_jax.compare runs/a runs/b
    python -m sparsecut_jax.compare runs/a runs/b runs/c --out=runs/comparison

Differences are from the first run. Each folder was written by `train` or `evaluate`.
"""

from __future__ import annotations

import dataclasses
import os

from absl import flags

from sparsecut_jax.commandline import cli
from sparsecut_jax.evaluation import comparison, comparison_page
from sparsecut_jax.runtime.folders import make_folder, print_files, write_json
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.tasks.answers import SCORES
from sparsecut_jax.types import UserError

FLAGS = flags.FLAGS


def main(*folders: str) -> None:
    if FLAGS.limit < 1:
        raise UserError(f"--limit={FLAGS.limit}: expected at least 1 question")
    runs = comparison.load(folders)
    out = make_folder("--out", FLAGS.out)
    settings, lines = comparison.settings_that_differ(runs), comparison.compare(runs)
    notes = comparison.notes(lines, runs)
    names = [run.name for run in runs]
    print("settings that differ:" if settings else "all settings are the same")
    if settings:
        print(table(["", *names], [[key, *values] for key, values in settings.items()]))
    print(f"\nscores, and differences from {names[0]} in percentage points, with 95 % intervals:")
    print(table(["test", "kind", "score", *names, *(f"{name} - {names[0]}" for name in names[1:])], rows_of(lines)))
    for note in notes:
        print(f"note: {note}")

    curves = os.path.join(out, "curves.png")
    if any("loss" in line for run in runs for line in run.metrics):
        from sparsecut_jax.training import plots  # here: matplotlib takes a third of a second

        plots.save_curves(curves, {run.name: run.metrics for run in runs})
    elif os.path.exists(curves):
        os.remove(curves)  # of an earlier comparison
    write_json(
        os.path.join(out, "compare.json"),
        {"runs": list(folders), "settings": settings, "scores": [dataclasses.asdict(line) for line in lines]},
    )
    page = comparison_page.page(runs, settings, lines, notes, curves, FLAGS.limit)
    with open(os.path.join(out, "compare.html"), "w", encoding="utf-8") as file:
        file.write(page)
    print(f"\nwritten to {out}:")
    print_files(
        out,
        {
            "compare.html": "all of this, and the answers that differ or are wrong, with their images",
            "compare.json": "the figures",
            "curves.png": "loss of all runs",
        },
    )


def rows_of(lines: list[comparison.Line]) -> list[list[str]]:
    """Lines as cells of a table: test, kind, score, a value for every run, a difference for every run but the first."""
    text = lambda value: "-" if value is None else str(value)
    return [
        [line.test, line.kind or "all", SCORES[line.score], *map(text, line.values), *map(text, line.differences)]
        for line in lines
    ]


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the folders
    flags.DEFINE_string("out", "runs/compare", "Folder to write to.")
    flags.DEFINE_integer("limit", 200, "Maximum number of questions on the page of answers.")
    cli.run(main, __doc__, arguments=True)


if __name__ == "__main__":
    run()
