"""Accuracy by generation: grouping, counting, and one encoding for all questions of an image."""

from types import SimpleNamespace

import pytest

from small_tokenizers import byte_level
from sparsecut_jax.data.conversation import encode_row
from sparsecut_jax.data.templates import TEMPLATES
from sparsecut_jax.evaluation.vqa import Answered, asked_turns, questions, samples, summarize


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


def test_samples_are_spread():
    found = [answered("", str(i), "") for i in range(100)]
    assert [a.expected for a in samples(found, 4)] == ["0", "33", "66", "99"]
    assert len(samples(found[:2], 12)) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["a", "b"], "said": ["one <image> two <image>", "x"]},
        {"images": ["a", "b"], "said": ["what is it? <image>", "x", "<image> and this?", "y"]},
        {"image": "a", "said": ["<image>\nwhat?", "x", "\nreally?", "y"], "independent": True},
        {"said": [" what? ", "x"], "system": "Be brief."},
    ],
)
def test_a_question_is_asked_as_it_is_trained_on(row):
    row["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(row["said"])]
    run = SimpleNamespace(tokenizer=byte_level(), template="vicuna_v1", config=SimpleNamespace(tokens_per_image=2))
    trained = encode_row(row, run.tokenizer, TEMPLATES[run.template], 2, 1000)
    for branch, question in enumerate(questions({0: row}, run), start=1):
        seen = trained.tokens[(trained.branches == 0) | (trained.branches == branch)].tolist()
        prompt = question.prompt.tokens.tolist()
        assert prompt == seen[: len(prompt)]
        assert question.prompt.image_start == trained.image_start[: len(question.prompt.image_start)]
