"""Which questions are asked and how, which answers count, and how long an answer may be."""

from types import SimpleNamespace

import pytest

from small_tokenizers import byte_level
from sparsecut_jax.data.parts import Folder, Part
from sparsecut_jax.evaluation.vqa import answer_limit, asked_turns, example, questions, references, samples
from sparsecut_jax.text.conversation import encode_prompt, encode_row
from sparsecut_jax.text.templates import TEMPLATES
from sparsecut_jax.types import BadSample


def test_independent_turns_are_all_asked_and_of_a_conversation_the_first():
    turns = [{"from": who, "value": str(i)} for i, who in enumerate(["human", "gpt"] * 3)]
    talk, questions = {"conversations": turns}, {"conversations": turns, "independent": True}
    assert [(h["value"], g["value"]) for h, g in asked_turns(talk)] == [("0", "1")]
    assert [h["value"] for h, _ in asked_turns(questions)] == ["0", "2", "4"]


def test_samples_are_spread():
    assert samples(list(range(100)), 4) == [0, 33, 66, 99]
    assert samples([5, 6], 12) == [5, 6]


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
    for branch, question in enumerate(questions({0: row}, engine), start=1):
        seen = trained.tokens[(trained.branches == 0) | (trained.branches == branch)].tolist()
        prompt = question.prompt.tokens.tolist()
        assert prompt == seen[: len(prompt)]
        assert question.prompt.image_start == trained.image_start[: len(question.prompt.image_start)]


def test_a_question_whose_answer_is_not_trained_on_is_not_asked():
    said = turns("0", "1", "2", "3")
    said[1]["loss"] = False
    assert asked_turns({"conversations": said}) == []
    assert asked_turns({"conversations": said, "independent": True}) == [(said[2], said[3])]


def turns(*said: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


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


def test_an_example_asks_a_short_question_about_a_file(tmp_path):
    (tmp_path / "a b.png").write_bytes(b"")
    part = lambda *rows: Part("mine", rows, Folder(str(tmp_path), 1, "config.data.images"), 2)
    row = lambda image, *said: {"image": image, "conversations": turns(*said)}
    long, lost = row("a b.png", "<image>\n" + "why? " * 50, "so"), row("lost.png", "<image>\nwho?", "me")
    good = row("a b.png", "what?\n<image>", "red")
    text, two = {"conversations": turns("how?", "so")}, row(["a b.png"] * 2, "<image> or <image>?", "x")
    assert example([part({}, text, lost, long, good)]) == ("what?", [f"{tmp_path}/a b.png"])
    assert example([part(two)]) == ("<image> or <image>?", [f"{tmp_path}/a b.png"] * 2)
    assert example([part(text)]) == ("how?", [])
    assert example([part(lost)]) == ("who?", [f"{tmp_path}/lost.png"])
    assert example([part(row(b"x", "<image>", "a dog"))]) == ("<image>", ["PATH"])
    assert example([part({})]) == ("what is in the image?", ["PATH"])


def test_the_longest_answer_follows_the_data():
    """A token a letter and one for the space: 13 letters are 14 tokens, a quarter more and the end make 19."""
    rows = [{"conversations": turns("what?", "red")}, {"conversations": []}]
    part = lambda *more: Part("mine", [*rows, *more], Folder("", 1), 1)
    run = lambda limit: SimpleNamespace(
        tokenizer=byte_level(), template="qa", config=SimpleNamespace(eval=SimpleNamespace(max_new_tokens=limit))
    )
    assert answer_limit(run(0), part()) == 8
    assert answer_limit(run(0), part({"conversations": turns("what?", "x" * 13)})) == 24
    assert answer_limit(run(0), part({"conversations": turns("what?", "red"), "answers": ["y" * 13]})) == 24
    assert answer_limit(run(0), part({"conversations": turns("what?", "x" * 5000)})) == 512
    assert answer_limit(run(3), part()) == 3
