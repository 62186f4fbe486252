"""Scores of answers: exact and normalized match, the VQA score and ROUGE-L, each with a 95 % interval."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from sparsecut_jax.evaluation.answered import Answered
from sparsecut_jax.evaluation.vqa_rules import HUMANS, normalize, vqa_score

# Key in results.json -> what tables call it.
SCORES = {
    "accuracy": "accuracy",
    "normalized_accuracy": "normalized match",
    "vqa_accuracy": "VQA score",
    "rouge_l": "ROUGE-L",
}
PROPORTIONS = ("accuracy", "normalized_accuracy")  # means of zeros and ones
LONG = 5  # words of an expected answer from which on ROUGE-L is meaningful
RESAMPLES = 2000
WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+"
)  # Chinese and Japanese by character


@dataclasses.dataclass(frozen=True)
class Score:
    """The mean of a score over `count` questions, and its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2%} ({self.low:.1%} to {self.high:.1%})"


def scores_of(item: Answered) -> dict[str, float]:
    """The scores that apply to one answer, each from 0 to 1.

    `vqa_accuracy` needs the answers of ten humans, `rouge_l` an expected answer of LONG words or more.
    """
    said, known = normalize(item.answer), {item.expected, *item.references}
    found = {"accuracy": float(item.correct), "normalized_accuracy": float(said in map(normalize, known))}
    if len(item.references) == HUMANS:
        found["vqa_accuracy"] = vqa_score(item.answer, item.references)
    if len(WORDS.findall(item.expected)) >= LONG:
        found["rouge_l"] = rouge_l(item.answer, sorted(known))
    return found


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), for the best-matching reference."""
    return _rouge().score_multi(references, answer)["rougeL"].fmeasure


@functools.cache
def _rouge():
    from rouge_score import rouge_scorer, tokenizers  # here: it takes a second

    class Words(tokenizers.Tokenizer):
        """Its own tokenizer drops all letters but a to z."""

        def tokenize(self, text: str) -> list[str]:
            return WORDS.findall(text.lower())

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


def summarize(answered: list[Answered]) -> dict[str, dict[str, Score]]:
    """{"": scores of all answers, "color": of those of kind "color", ...}; a score that applies to none is left out."""
    groups: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for item in answered:
        for name, value in scores_of(item).items():
            for group in {"", item.kind.replace("/", "_")}:
                groups[group][name].append(value)
    return {
        group: {name: score(name, scores[name]) for name in SCORES if name in scores}
        for group, scores in sorted(groups.items())
    }


def score(name: str, values: Sequence[float]) -> Score:
    """Mean and interval: Wilson's for a proportion, otherwise a bootstrap with a fixed seed."""
    from scipy import stats  # here: it takes a second

    values = np.asarray(values)
    if name in PROPORTIONS:
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
    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, batch=batch, vectorized=True, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def results(test: str, groups: dict[str, dict[str, Score]]) -> dict[str, float | int | list[float]]:
    """As results.json has it: {test/accuracy: mean, test/accuracy_interval: [low, high], test/count: n, ...}.

    A score that applies only to some questions has its own count, such as test/rouge_l_count.
    """
    found: dict[str, float | int | list[float]] = {}
    for group, scores in groups.items():
        at, count = f"{test}/{group}" if group else test, scores["accuracy"].count
        found[f"{at}/count"] = count
        for name, value in scores.items():
            found[f"{at}/{name}"] = value.mean
            found[f"{at}/{name}_interval"] = [value.low, value.high]
            if value.count != count:
                found[f"{at}/{name}_count"] = value.count
    return found
