"""What the runs of a comparison of many arms reached: one record for each run, in a file, and tables and a picture of them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sparsecut_jax.runtime.tables import markdown
from sparsecut_jax.training.report import read_metrics
from sparsecut_jax.types import UserError

HELDOUT = "heldout_"  # beginning of the kinds of questions about combinations that training never showed


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
      arm, seed: what was run; settings: a digest of all that it was given.
      fusion: parameters of the fusion, with those of its way of injecting.
      positions: of an image in the LLM.
      flops: model FLOPs of a training step, without a tower whose outputs are stored.
      seconds_per_step: median.
      curve: (step, share of held-out answers that are right) at every evaluation.
      kinds: {kind of question: accuracy in the test}.
    """

    arm: str
    seed: int
    settings: str
    fusion: int
    positions: int
    flops: float
    seconds_per_step: float
    curve: list[tuple[int, float]]
    kinds: dict[str, float]

    @property
    def learning(self) -> float:
        """Mean accuracy over the learning curve."""
        return float(np.mean([accuracy for _, accuracy in self.curve]))

    def final(self, heldout: bool = False) -> float:
        """Mean accuracy over the kinds of questions, all equally frequent."""
        return float(np.mean([value for kind, value in self.kinds.items() if kind.startswith(HELDOUT) == heldout]))


def record_of(folder: str, arm: str, seed: int, settings: str) -> Record:
    """The record of a run that has ended. Raises UserError if its folder lacks something."""
    try:
        with open(os.path.join(folder, "results.json")) as file:
            results = json.load(file)
        model = results["model"]
        metrics = read_metrics(folder)
        curve = [(line["step"], line["holdout_accuracy"]) for line in metrics if "holdout_accuracy" in line]
        test = next(key for key in results if key.endswith("/count")).removesuffix("/count")
        kinds = {
            key.split("/")[-2]: value
            for key, value in results.items()
            if key.endswith("/accuracy") and key != f"{test}/accuracy"
        }
        seconds = [line["seconds_per_step_median"] for line in metrics if "seconds_per_step_median" in line][-1]
        return Record(
            arm,
            seed,
            settings,
            model["parameters"]["fusion"],
            model["positions"],
            model["flops_per_step"],
            seconds,
            curve,
            kinds,
        )
    except (OSError, ValueError, KeyError, IndexError, StopIteration) as error:
        raise UserError(f"{folder} is not a finished run with a test: {type(error).__name__} {error}") from error


def read_records(path: str) -> list[Record]:
    """The records in a file, one JSON object a line. Raises UserError for a damaged line."""
    records = []
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} line {number} is not the record of a run: {error}") from error
    return records


def write_records(path: str, records: Iterable[Record]) -> None:
    """Replaces the file as a whole."""
    with open(path + ".tmp", "w") as file:
        file.writelines(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
    os.replace(path + ".tmp", path)


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """{arm: its runs}, the best learning curve first."""
    groups = collections.defaultdict(list)
    for record in records:
        groups[record.arm].append(record)
    return dict(sorted(groups.items(), key=lambda item: -np.mean([record.learning for record in item[1]])))


def interval(values: Sequence[float]) -> str:
    """Mean in per cent and the half width of its 95 % t interval; the mean alone of a single value."""
    from scipy import stats  # here: it takes a second

    mean = 100 * np.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * 100 * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def tables(records: Sequence[Record]) -> str:
    """Two Markdown tables: what each arm costs and reaches, and its accuracy by question."""
    arms = by_arm(records)
    kinds = [kind for kind in records[0].kinds if not kind.startswith(HELDOUT)]
    over: Callable[[list[Record], Any], str] = lambda runs, value: interval([value(run) for run in runs])
    first = [
        [
            f"`{arm}`", str(len(runs)), f"{runs[0].fusion:,}", str(runs[0].positions), f"{runs[0].flops / 1e9:.1f}",
            f"{np.median([run.seconds_per_step for run in runs]):.2f}",
            over(runs, lambda run: run.learning), over(runs, lambda run: run.final()), over(runs, lambda run: run.final(True)),
        ]
        for arm, runs in arms.items()
    ]  # fmt: skip
    heads = [
        "arm",
        "runs",
        "parameters",
        "positions",
        "GFLOP a step",
        "seconds a step",
        "learning curve",
        "test",
        "new combinations",
    ]
    second = [
        [f"`{arm}`", *(f"{100 * np.mean([run.kinds[kind] for run in runs]):.0f}" for kind in kinds)]
        for arm, runs in arms.items()
    ]
    names = [kind.split("_")[-1] for kind in kinds]
    return f"{markdown(heads, first)}\n\n{markdown(['arm', *names], second)}\n"


def save_curves(path: str, records: Sequence[Record]) -> None:
    """A picture of the learning curves, the mean over seeds, a panel for every six arms."""
    from sparsecut_jax.runtime.figures import plt  # here: matplotlib takes a third of a second

    arms = list(by_arm(records).items())
    each = 6
    panels = -(-len(arms) // each)
    figure, axes = plt.subplots(1, panels, figsize=(4 * panels, 4), sharey=True, squeeze=False, layout="constrained")
    for i, (arm, runs) in enumerate(arms):
        steps = [step for step, _ in runs[0].curve]
        values = np.mean([[accuracy for _, accuracy in run.curve] for run in runs], axis=0)
        axes[0, i // each].plot(steps, 100 * values, marker="o", markersize=3, label=arm)
    for panel in axes[0]:
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out answers that are right (%)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
