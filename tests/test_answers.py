"""Which questions are asked and how, which answers count, and how long an answer may be."""

from types import SimpleNamespace

import pytest

from small_tokenizers import byte_level
from sparsecut_jax.tasks.answers import asked_turns, limit, prompt_of, references, scores_of
from sparsecut_jax.text.conversation import encode_prompt, encode_row
from sparsecut_jax.text.templates import TEMPLATES
from sparsecut_jax.types import Answered, BadSample


def turns(*said: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def test_independent_turns_are_all_asked_and_of_a_conversation_the_first():
    turns = [{"from": who, "value": str(i)} for i, who in enumerate(["human", "gpt"] * 3)]
    talk, questions = {"conversations": turns}, {"conversations": turns, "independent": True}
    assert [(h["value"], g["value"]) for h, g in asked_turns(talk)] == [("0", "1")]
    assert [h["value"] for h, _ in asked_turns(questions)] == ["0", "2", "4"]


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
    how = (byte_level(), TEMPLATES["vicuna_v1"], 2)
    trained = encode_row(row, *how, 1000)
    engine = SimpleNamespace(prompt=lambda text, images, system: encode_prompt(text, images, *how, system))
    for branch, (human, _) in enumerate(asked_turns(row), start=1):
        seen = trained.tokens[(trained.branches == 0) | (trained.branches == branch)].tolist()
        prompt = prompt_of(row, human, engine)
        assert prompt.tokens.tolist() == seen[: len(prompt.tokens)]
        assert prompt.image_start == trained.image_start[: len(prompt.image_start)]


def test_a_question_whose_answer_is_not_trained_on_is_not_asked():
    said = turns("0", "1", "2", "3")
    said[1]["loss"] = False
    assert asked_turns({"conversations": said}) == []
    assert asked_turns({"conversations": said, "independent": True}) == [(said[2], said[3])]


def test_references_of_a_row_and_of_a_turn():
    gpt = {"from": "gpt", "value": "sofa"}
    row = {"conversations": turns("what?", "sofa")}
    assert references(row, gpt) == ()
    assert references(row | {"answers": [" couch ", {"answer": "settee", "answer_id": 1}]}, gpt) == ("couch", "settee")
    assert references(row, gpt | {"answers": ["couch"]}) == ("couch",)
    for wrong in ("couch", [], [""], [1], [{"text": "couch"}]):
        with pytest.raises(BadSample, match="key 'answers' must be a list of strings"):
            references(row | {"answers": wrong}, gpt)
    two = {"conversations": turns("what?", "sofa", "who?", "me"), "independent": True, "answers": ["couch"]}
    with pytest.raises(BadSample, match="'answers' is ambiguous for 2 questions; move it into an answer turn"):
        references(two, gpt)


def test_the_longest_answer_follows_the_data():
    """A token a letter and one for the space: 13 letters are 14 tokens, a quarter more and the end make 19."""
    rows = [{"conversations": turns("what?", "red")}, {"conversations": []}]
    setting = lambda limit: SimpleNamespace(eval=SimpleNamespace(max_new_tokens=limit))
    run = lambda limit: SimpleNamespace(tokenizer=byte_level(), config=setting(limit))
    engine = lambda limit: SimpleNamespace(run=run(limit), template=TEMPLATES["qa"])
    assert limit(None, engine(0), rows) == 8
    assert limit(None, engine(0), [*rows, {"conversations": turns("what?", "x" * 13)}]) == 24
    assert limit(None, engine(0), [*rows, {"conversations": turns("what?", "red"), "answers": ["y" * 13]}]) == 24
    assert limit(None, engine(0), [*rows, {"conversations": turns("what?", "x" * 5000)}]) == 512
    assert limit(None, engine(3), rows) == 3


def test_which_scores_apply():
    def scores(expected: str, answer: str, references: tuple[str, ...] = ()) -> dict[str, float]:
        return scores_of(Answered("set/test", "0", "", "what?", (), expected, references, answer, False, 1))

    assert scores("red", "Red.") == {"accuracy": 0.0, "normalized_accuracy": 1.0}
    assert scores("sofa", "couch", ("couch",))["accuracy"] == 1.0
    assert scores("sofa", "sofa", ("couch",))["accuracy"] == 1.0
    assert scores("2", "two", ("2",) * 2 + ("3",) * 8)["vqa_accuracy"] == pytest.approx(0.6)
    caption = scores("a red bus on a street", "the red bus in a street")
    assert caption == {"accuracy": 0.0, "normalized_accuracy": 0.0, "rouge_l": pytest.approx(4 / 6)}
