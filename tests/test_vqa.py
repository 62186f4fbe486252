"""Accuracy by generation: grouping, counting, and one encoding for all questions of an image."""

from sparsecut_jax.evaluation.vqa import Answered, asked_turns, count_questions, samples, summarize


def answered(kind: str, expected: str, answer: str) -> Answered:
    return Answered("row", kind, "what?", expected, answer)


def test_summarize():
    found = [
        answered("color", "red", "red"), answered("color", "red", "blue"),
        answered("yes/no", "no", "no"), answered("", "x", "y"),
    ]  # fmt: skip
    assert summarize(found, "set/test") == {
        "set/test/accuracy": 0.5, "set/test/count": 4,
        "set/test/color/accuracy": 0.5, "set/test/color/count": 2,
        "set/test/yes_no/accuracy": 1.0, "set/test/yes_no/count": 1,
    }  # fmt: skip


def test_independent_turns_are_all_asked_and_of_a_conversation_the_first():
    turns = [{"from": who, "value": str(i)} for i, who in enumerate(["human", "gpt"] * 3)]
    talk, questions = {"conversations": turns}, {"conversations": turns, "independent": True}
    assert [(h["value"], g["value"]) for h, g in asked_turns(talk)] == [("0", "1")]
    assert [h["value"] for h, _ in asked_turns(questions)] == ["0", "2", "4"]
    assert count_questions([talk, questions, questions]) == 7


def test_samples_are_spread():
    found = [answered("", str(i), "") for i in range(100)]
    assert [a.expected for a in samples(found, 4)] == ["0", "33", "66", "99"]
    assert len(samples(found[:2], 12)) == 2
