"""Compares runs: the settings that differ, and scores on the questions that both were asked."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from flax import traverse_util

from sparsecut_jax.evaluation.answered import read_answers
from sparsecut_jax.evaluation.scores import Score, difference, score
from sparsecut_jax.tasks.answers import SCORES, SHARES, scores_of
from sparsecut_jax.training.report import read_metrics
from sparsecut_jax.types import Answered, UserError

Key = tuple[str, str, str, str, int]  # a question of any run: test, row, question, expected answer, occurrence


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a run has left in its folder: `config` as it is in config.json, `settings` by their dotted names, `metrics` as
    the lines of metrics.jsonl."""

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    answers: dict[Key, Answered]
    metrics: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A run's score minus the first run's. paired: over the `score.count` questions that both were asked."""

    score: Score
    paired: bool

    def __str__(self) -> str:
        points = [f"{100 * x:+.1f}" for x in (self.score.mean, self.score.low, self.score.high)]
        return f"{points[0]} ({points[1]} to {points[2]}){'' if self.paired else ' unpaired'}"


@dataclasses.dataclass(frozen=True)
class Line:
    """One score of one group of questions ("": all of a test), for every run; None where a run lacks it."""

    test: str
    kind: str
    score: str
    values: list[Score | None]
    differences: list[Difference | None]  # of the second run and those after it


def load(folders: Sequence[str]) -> list[Finished]:
    """Raises UserError for fewer than two folders, one named twice, and one without answers.jsonl or config.json."""
    if len(folders) < 2:
        raise UserError(
            f"expected two or more runs to compare, got {len(folders)}: python -m sparsecut_jax.compare runs/a runs/b"
        )
    paths = [os.path.abspath(folder) for folder in folders]
    for i, folder in enumerate(folders):
        if paths[i] in paths[:i]:
            raise UserError(f"{folder} is named twice")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [_load(folder, os.path.relpath(path, root)) for folder, path in zip(folders, paths, strict=True)]


def _load(folder: str, name: str) -> Finished:
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; expected the workdir of a run")
    path = os.path.join(folder, "answers.jsonl")
    answers = read_answers(path) if os.path.exists(path) else []
    if not answers:
        raise UserError(
            f"{folder} has no answers in answers.jsonl; `python -m sparsecut_jax.evaluate --workdir={folder}` writes them"
        )
    keyed, seen = {}, collections.Counter()
    for item in answers:
        key = (item.test, item.row, item.question, item.expected)
        keyed[*key, seen[key]] = item
        seen[key] += 1
    # For a checkpoint other than the latest, `evaluate` writes to workdir/step_N.
    homes = [home for home in (folder, os.path.dirname(os.path.abspath(folder)))
             if os.path.exists(os.path.join(home, "config.json"))]  # fmt: skip
    if not homes:
        raise UserError(f"{folder} has no config.json; expected the workdir of a run")
    try:
        with open(os.path.join(homes[0], "config.json")) as file:
            config = json.load(file)
        settings = traverse_util.flatten_dict(config, sep=".")
    except (ValueError, AssertionError) as error:
        raise UserError(f"{homes[0]}/config.json is not the config of a run: {error}") from error
    settings["step"] = max(item.step for item in answers)
    return Finished(name, config, settings, keyed, read_metrics(homes[0]))


def settings_that_differ(runs: Sequence[Finished]) -> dict[str, list[str]]:
    """{name: its value in every run}, without the workdir and stages that no run has."""
    stages = {stage for run in runs for stage in run.settings.get("run_stages", ())}
    values_by_key = {}
    for key in sorted({key for run in runs for key in run.settings}):
        parts = key.split(".")
        if key == "workdir" or parts[0] == "stages" and parts[1] not in stages:
            continue
        values = [_shown(run.settings[key]) if key in run.settings else "-" for run in runs]
        if len(set(values)) > 1:
            values_by_key[key] = values
    return values_by_key


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "()" if isinstance(value, list) else str(value)


def compare(runs: Sequence[Finished]) -> list[Line]:
    """All scores of every test, and the accuracy of every kind of question."""
    scored = [{key: scores_of(item) for key, item in run.answers.items()} for run in runs]
    members: dict[tuple[str, str], list[Key]] = collections.defaultdict(list)  # the questions of a test and a kind
    for key in dict.fromkeys(key for run in runs for key in run.answers):
        kind = next(run.answers[key].kind for run in runs if key in run.answers)
        for group in dict.fromkeys(("", kind)):
            members[key[0], group].append(key)
    lines = []
    for test in dict.fromkeys(test for test, _ in members):
        for kind in sorted(kind for known, kind in members if known == test):
            for name in SCORES if not kind else ("accuracy",):
                values = [
                    {key: found[key][name] for key in members[test, kind] if name in found.get(key, ())}
                    for found in scored
                ]
                if any(values):
                    means = [score(list(of.values()), name in SHARES) if of else None for of in values]
                    others = [_difference(values[0], of) for of in values[1:]]
                    lines.append(Line(test, kind, name, means, others))
    return lines


def _difference(first: dict[Key, float], second: dict[Key, float]) -> Difference | None:
    common = [key for key in first if key in second]
    if common:
        return Difference(difference([first[k] for k in common], [second[k] for k in common], paired=True), True)
    if not first or not second:
        return None
    return Difference(difference(list(first.values()), list(second.values()), paired=False), False)


def notes(lines: Sequence[Line], runs: Sequence[Finished]) -> list[str]:
    """A sentence for each run whose questions in a test differ from the first run's."""
    sentences = []
    for line in lines:
        if line.kind or line.score != "accuracy":
            continue
        for run, value, other in zip(runs[1:], line.values[1:], line.differences, strict=True):
            who = f"{line.test}: {runs[0].name} and {run.name}"
            if other is not None and not other.paired:
                sentences.append(f"{who} were asked different questions; their difference is not paired")
            elif other is not None and not other.score.count == value.count == line.values[0].count:
                counts = f"{line.values[0].count:,} and {value.count:,}"
                sentences.append(
                    f"{who} share {other.score.count:,} of {counts} questions; the difference is over these"
                )
    return sentences
