"""Means of scores, each with a 95 % interval; what is scored, and how, says the task."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from sparsecut_jax.tasks.registry import Task
from sparsecut_jax.types import Answered

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Score:
    """The mean of a score over `count` questions, and its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2%} ({self.low:.1%} to {self.high:.1%})"


def summarize(answered: list[Answered], task: Task) -> dict[str, dict[str, Score]]:
    """{"": scores of all answers, "color": of those of kind "color", ...}; a score that applies to none is left out."""
    groups: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for item in answered:
        for name, value in task.module.scores_of(item).items():
            for group in {"", item.kind.replace("/", "_")}:
                groups[group][name].append(value)
    return {
        group: {name: score(scores[name], name in task.module.SHARES) for name in task.scores if name in scores}
        for group, scores in sorted(groups.items())
    }


def count(scores: dict[str, Score]) -> int:
    """Questions of a group; a score may apply to fewer."""
    return max(value.count for value in scores.values())


def score(values: Sequence[float], share: bool) -> Score:
    """Mean and interval: Wilson's for a share, whose values are 0 or 1, otherwise a bootstrap with a fixed seed."""
    from scipy import stats  # here: it takes a second

    values = np.asarray(values)
    if share:
        low, high = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    elif len(values) == 1:
        low, high = 0.0, 1.0
    else:
        low, high = _bootstrap((values,), np.mean)
    return Score(float(values.mean()), float(low), float(high), len(values))


def difference(first: Sequence[float], second: Sequence[float], paired: bool) -> Score:
    """Mean of `second` minus mean of `first`, with an interval by bootstrap with a fixed seed.

    paired: values at the same index belong to the same question and are resampled together.
    """
    a, b = np.asarray(first), np.asarray(second)
    mean = float(b.mean() - a.mean())
    if min(len(a), len(b)) == 1:
        return Score(mean, -1.0, 1.0, min(len(a), len(b)))
    low, high = (
        _bootstrap((b - a,), np.mean) if paired else _bootstrap((a, b), lambda a, b, axis: b.mean(axis) - a.mean(axis))
    )
    return Score(mean, low, high, min(len(a), len(b)))


def _bootstrap(samples: tuple[np.ndarray, ...], statistic) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic."""
    from scipy import stats

    batch = max(1, 2_000_000 // max(map(len, samples)))
    bootstrapped = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, batch=batch, vectorized=True, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(bootstrapped.confidence_interval.low), float(bootstrapped.confidence_interval.high)


def results(test: str, groups: dict[str, dict[str, Score]]) -> dict[str, float | int | list[float]]:
    """As results.json has it: {test/accuracy: mean, test/accuracy_interval: [low, high], test/count: n, ...}.

    A score that applies only to some questions has its own count, such as test/rouge_l_count.
    """
    found: dict[str, float | int | list[float]] = {}
    for group, scores in groups.items():
        at = f"{test}/{group}" if group else test
        found[f"{at}/count"] = count(scores)
        for name, value in scores.items():
            found[f"{at}/{name}"] = value.mean
            found[f"{at}/{name}_interval"] = [value.low, value.high]
            if value.count != count(scores):
                found[f"{at}/{name}_count"] = value.count
    return found
