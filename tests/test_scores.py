"""Means of scores with their intervals, and the files of answers."""

import json

import pytest

from sparsecut_jax.evaluation.accuracy import _cell
from sparsecut_jax.evaluation.answered import read_answers, write_answers
from sparsecut_jax.evaluation.scores import difference, results, score, summarize
from sparsecut_jax.tasks.registry import Task
from sparsecut_jax.types import Answered, UserError


def answered(expected: str, answer: str, references: tuple[str, ...] = (), kind: str = "", **fields) -> Answered:
    return Answered(
        **{
            "test": "set/test", "row": "0", "kind": kind, "question": "what?", "images": (), "expected": expected,
            "references": references, "answer": answer, "cut": False, "step": 1, **fields,
        }
    )  # fmt: skip


def test_intervals():
    twelve = score([1] * 12, share=True)
    assert (twelve.mean, twelve.high, twelve.count) == (1.0, 1.0, 12)
    assert twelve.low == pytest.approx(12 / (12 + 1.959964**2), abs=1e-6)  # Wilson's at n of n
    half = score([0, 1] * 50, share=True)
    assert (half.low, half.high) == pytest.approx((0.403832, 0.596168), abs=1e-6)
    means = [0.2, 0.4, 0.9] * 20
    soft = score(means, share=False)
    assert soft == score(means, share=False)  # the same at every call
    assert soft.mean == pytest.approx(0.5)
    assert 0.40 < soft.low < 0.45 and 0.55 < soft.high < 0.60  # 1.96 of 0.038 on either side
    single = score([0.7], share=False)
    assert (single.low, single.high) == (0.0, 1.0)  # one answer says nothing


def test_paired_differences_are_surer():
    """Of 100 questions 50 are hard for both runs; the second answers ten more of the others."""
    first, second = [0] * 50 + [1] * 40 + [0] * 10, [0] * 50 + [1] * 50
    paired, unpaired = (difference(first, second, paired) for paired in (True, False))
    assert paired.mean == unpaired.mean == pytest.approx(0.1)
    assert 0.03 < paired.low < paired.high < 0.17
    assert unpaired.low < 0 < unpaired.high


def test_results_by_kind():
    found = [
        answered("red", "red", kind="color"), answered("red", "blue", kind="color"),
        answered("no", "no", kind="yes/no"), answered("x", "y"),
    ]  # fmt: skip
    flat = results("set/test", summarize(found, Task()))
    assert {key: value for key, value in flat.items() if key.endswith(("/accuracy", "/count"))} == {
        "set/test/accuracy": 0.5, "set/test/count": 4,
        "set/test/color/accuracy": 0.5, "set/test/color/count": 2,
        "set/test/yes_no/accuracy": 1.0, "set/test/yes_no/count": 1,
    }  # fmt: skip
    assert flat["set/test/accuracy_interval"] == pytest.approx([0.150039, 0.849961], abs=1e-6)
    assert "set/test/rouge_l" not in flat
    long = answered("a red bus on a street", "a red bus on a street")
    assert results("t", summarize([*found, long], Task()))["t/rouge_l_count"] == 1


def test_answers_of_other_tests_and_of_the_same_step_stay(tmp_path):
    path = write_answers(str(tmp_path), [answered("a", "b", ("c",), images=("x.png", None))])
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == {
        "test": "set/test", "row": "0", "kind": "", "question": "what?", "images": ["x.png", None], "expected": "a",
        "references": ["c"], "answer": "b", "cut": False, "step": 1,
    }  # fmt: skip
    kept = lambda: [(item.test, item.answer, item.step) for item in read_answers(path)]
    write_answers(str(tmp_path), [answered("a", "other", test="other/test")])
    assert kept() == [("set/test", "b", 1), ("other/test", "other", 1)]
    write_answers(str(tmp_path), [answered("a", "again")])
    assert kept() == [("other/test", "other", 1), ("set/test", "again", 1)]
    write_answers(str(tmp_path), [answered("a", "later", step=2)])
    assert kept() == [("set/test", "later", 2)]
    (tmp_path / "answers.jsonl").write_text('{"row": "1", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl line 1 is not in the format"):
        read_answers(path)


def test_a_sample_is_one_short_line():
    assert _cell("what\ncolor?") == "what\\ncolor?"
    assert _cell("x" * 60) == "x" * 60
    assert _cell("x" * 61) == "x" * 56 + " ..."
