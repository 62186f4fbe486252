"""Records of runs, and the tables of them."""

from __future__ import annotations

import json

import pytest

from sparsecut_jax.evaluation import arms
from sparsecut_jax.evaluation.arms import Record
from tiny import refusal


def record(arm: str, seed: int, accuracies: tuple[float, ...], **kinds: float) -> Record:
    curve = [(10 * (i + 1), accuracy) for i, accuracy in enumerate(accuracies)]
    return Record(arm, seed, "abc", 1234, 16, 5e9, 0.5, curve, kinds)


RUNS = [
    record("plain", 0, (0.2, 0.4), low_color=0.5, high_shape=0.7, heldout_low_color=0.1),
    record("plain", 1, (0.2, 0.6), low_color=0.7, high_shape=0.9, heldout_low_color=0.3),
    record("best", 0, (0.9, 1.0), low_color=1.0, high_shape=1.0, heldout_low_color=1.0),
]


def test_mean_and_interval():
    """Of 0.2 and 0.4: mean 30 %, standard error 10 %, and t with one degree of freedom is 12.706."""
    assert arms.interval([0.2, 0.4]) == "30.0 ± 127.1"
    assert arms.interval([0.5]) == "50.0"


def test_tables_have_the_best_learner_first():
    first, second = arms.tables(RUNS).strip().split("\n\n")
    assert first.splitlines() == [
        "| arm | runs | parameters | positions | GFLOP a step | seconds a step | learning curve | test | new combinations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `best` | 1 | 1,234 | 16 | 5.0 | 0.50 | 95.0 | 100.0 | 100.0 |",
        "| `plain` | 2 | 1,234 | 16 | 5.0 | 0.50 | 35.0 ± 63.5 | 70.0 ± 127.1 | 20.0 ± 127.1 |",
    ]
    assert second.splitlines() == [
        "| arm | color | shape |",
        "| --- | --- | --- |",
        "| `best` | 100 | 100 |",
        "| `plain` | 60 | 80 |",
    ]


def test_records_survive_their_file(tmp_path):
    path = str(tmp_path / "lab.jsonl")
    assert arms.read_records(path) == []
    arms.write_records(path, RUNS)
    again = arms.read_records(path)
    assert [(r.arm, r.seed, r.kinds, r.learning) for r in again] == [(r.arm, r.seed, r.kinds, r.learning) for r in RUNS]
    with open(path, "a") as file:
        file.write('{"arm": "half"\n')
    assert refusal(arms.read_records, path).startswith(f"{path} line 4 is not the record of a run: ")


def test_a_run_becomes_a_record(tmp_path):
    results = {
        "step": 8,
        "model": {"parameters": {"fusion": 5, "llm": 7}, "positions": 9, "flops_per_step": 2e9},
        "scenes/test/count": 4,
        "scenes/test/accuracy": 0.5,
        "scenes/test/low_color/count": 2,
        "scenes/test/low_color/accuracy": 0.25,
        "scenes/test/low_color/normalized_accuracy": 0.3,
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    lines = [
        {"step": 4, "holdout_accuracy": 0.1},
        {"step": 8, "seconds_per_step_median": 0.2},
        {"step": 8, "holdout_accuracy": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = arms.record_of(str(tmp_path), "mlp", 3, "abc")
    assert made == Record("mlp", 3, "abc", 5, 9, 2e9, 0.2, [(4, 0.1), (8, 0.3)], {"low_color": 0.25})
    (tmp_path / "results.json").write_text("{}")
    assert "is not a finished run with a test: KeyError" in refusal(arms.record_of, str(tmp_path), "mlp", 3, "abc")


@pytest.mark.parametrize("count", [1, 7])
def test_curves_are_drawn(tmp_path, count):
    arms.save_curves(str(tmp_path / "lab.png"), [record(f"arm{i}", 0, (0.1 * i, 0.5)) for i in range(count)])
    assert (tmp_path / "lab.png").stat().st_size > 5000
