"""Scores of answers: what counts as the same, the published VQA score, ROUGE-L, and intervals."""

import json

import pytest

from sparsecut_jax.evaluation.accuracy import _cell
from sparsecut_jax.evaluation.answered import Answered, read_answers, write_answers
from sparsecut_jax.evaluation.scores import difference, results, rouge_l, score, scores_of, summarize
from sparsecut_jax.evaluation.vqa_rules import normalize, vqa_score
from sparsecut_jax.types import UserError


def answered(expected: str, answer: str, references: tuple[str, ...] = (), kind: str = "", **fields) -> Answered:
    return Answered(
        **{
            "test": "set/test", "row": "0", "kind": kind, "question": "what?", "images": (), "expected": expected,
            "references": references, "answer": answer, "cut": False, "step": 1, **fields,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red.", "red"),
        ("The  two dogs, I dont know", "2 dogs i don't know"),
        ("a An THE", ""),
        ("100,978 people", "100978 people"),
        ("red,blue", "red blue"),
        ("It is 2:50 pm.", "it is 2:50 pm"),
        ("1.5 m", "1.5 m"),
        ("U.S.A.", "usa"),
        ("none", "0"),
        ("ten-speed", "10 speed"),
        ("girl's its", "girl's its"),
        ("couldntve couldn\u2019tve", "couldn't've couldn't've"),
        ("black_and/white?", "black and white"),
        ("日本 語。", "日本 語"),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_vqa_score_is_the_published_one(same, expected):
    """The mean of min(1, n / 3) over the ten ways to leave one human out."""
    assert vqa_score("Yes.", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(expected)


def test_which_scores_apply():
    assert scores_of(answered("red", "Red.")) == {"accuracy": 0.0, "normalized_accuracy": 1.0}
    assert scores_of(answered("sofa", "couch", ("couch",)))["accuracy"] == 1.0
    assert scores_of(answered("sofa", "sofa", ("couch",)))["accuracy"] == 1.0
    assert scores_of(answered("2", "two", ("2",) * 2 + ("3",) * 8))["vqa_accuracy"] == pytest.approx(0.6)
    caption = answered("a red bus on a street", "the red bus in a street")
    assert scores_of(caption) == {"accuracy": 0.0, "normalized_accuracy": 0.0, "rouge_l": pytest.approx(4 / 6)}


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("a b c d", ["a c d x"], 0.75),
        ("a b c d", ["x", "a b c d"], 1.0),
        ("", ["a"], 0.0),
        ("Ärger über Öl", ["ärger ÜBER das öl"], 6 / 7),  # letters beyond a to z are letters
        ("红色的车", ["红车"], 2 / 3),
    ],
)
def test_rouge_l(answer, references, expected):
    assert rouge_l(answer, references) == pytest.approx(expected)


def test_intervals():
    twelve = score("accuracy", [1] * 12)
    assert (twelve.mean, twelve.high, twelve.count) == (1.0, 1.0, 12)
    assert twelve.low == pytest.approx(12 / (12 + 1.959964**2), abs=1e-6)  # Wilson's at n of n
    half = score("accuracy", [0, 1] * 50)
    assert (half.low, half.high) == pytest.approx((0.403832, 0.596168), abs=1e-6)
    means = [0.2, 0.4, 0.9] * 20
    soft = score("rouge_l", means)
    assert soft == score("rouge_l", means)  # the same at every call
    assert soft.mean == pytest.approx(0.5)
    assert 0.40 < soft.low < 0.45 and 0.55 < soft.high < 0.60  # 1.96 of 0.038 on either side
    assert (score("rouge_l", [0.7]).low, score("rouge_l", [0.7]).high) == (0.0, 1.0)  # one answer says nothing


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
    flat = results("set/test", summarize(found))
    assert {key: value for key, value in flat.items() if key.endswith(("/accuracy", "/count"))} == {
        "set/test/accuracy": 0.5, "set/test/count": 4,
        "set/test/color/accuracy": 0.5, "set/test/color/count": 2,
        "set/test/yes_no/accuracy": 1.0, "set/test/yes_no/count": 1,
    }  # fmt: skip
    assert flat["set/test/accuracy_interval"] == pytest.approx([0.150039, 0.849961], abs=1e-6)
    assert "set/test/rouge_l" not in flat
    long = answered("a red bus on a street", "a red bus on a street")
    assert results("t", summarize([*found, long]))["t/rouge_l_count"] == 1


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
