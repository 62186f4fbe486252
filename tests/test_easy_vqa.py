"""easy-VQA as LLaVA rows, and the captions that its answers give away."""

import os
from collections import Counter

import pytest

from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.data.easy_vqa import COLORS, SHAPES, captions, kind, load

SIZES = {
    "train": (4000, {"yes/no": 28407, "color": 5166, "shape": 5002}),
    "test": (1000, {"yes/no": 7136, "color": 1280, "shape": 1257}),
}


@pytest.fixture(scope="module", params=["train", "test"])
def split(request):
    return request.param, *load(request.param)


def questions(row):
    turns = row["conversations"]
    return [(human["value"], gpt["value"]) for human, gpt in zip(turns[::2], turns[1::2], strict=True)]


def answer_of(question: str, color: str, shape: str) -> str:
    """What easy-VQA answers to a question about one colored shape."""
    words = question.replace("<image>", "").strip().rstrip("?").split()
    if words[0] == "what":
        return color if "color" in words else shape
    there = bool({color, shape} & set(words))
    return "yes" if there != bool({"no", "not"} & set(words)) else "no"


# ----------------------------------------------------------------------------------------------------------------------
# the data set


def test_counts(split):
    name, rows, _ = split
    images, kinds = SIZES[name]
    assert len(rows) == len({row["image"] for row in rows}) == len({row["id"] for row in rows}) == images
    assert sum(kinds.values()) == {"train": 38575, "test": 9673}[name]
    assert Counter(turn["kind"] for row in rows for turn in row["conversations"][1::2]) == kinds


def test_rows_are_good_and_their_images_there(split):
    _, rows, folder = split
    files = set(os.listdir(folder))
    for row in rows:
        assert canonical(row, row["id"], max_images=1) is row
        assert row["image"] in files


def test_first_rows(split):
    name, rows, _ = split
    assert [row["id"] for row in rows[:2]] == [f"{name}/0", f"{name}/1"]
    assert [row["image"] for row in rows[:2]] == ["0.png", "1.png"]


def test_a_row():
    row = load("train")[0][0]
    assert row["independent"] is True
    assert row["conversations"][:6] == [
        {"from": "human", "value": "<image>\nwhat is the blue shape?"},
        {"from": "gpt", "value": "rectangle", "kind": "shape"},
        {"from": "human", "value": "\nwhat color is the shape?"},
        {"from": "gpt", "value": "blue", "kind": "color"},
        {"from": "human", "value": "\ndoes the image contain a rectangle?"},
        {"from": "gpt", "value": "yes", "kind": "yes/no"},
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("yes", "yes/no"), ("no", "yes/no"), ("red", "color"), ("gray", "color"), ("circle", "shape")],
)
def test_kind(answer, expected):
    assert kind(answer) == expected


# ----------------------------------------------------------------------------------------------------------------------
# captions


def caption(*pairs: str) -> str | None:
    """The caption of a picture of which these questions were asked, each "question -> answer"."""
    turns = []
    for pair in pairs:
        question, answer = pair.split(" -> ")
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    made = captions([{"id": "r", "image": "0.png", "conversations": turns}])
    return made[0]["conversations"][1]["value"] if made else None


NOT_SIX = [f"is there a {color} shape? -> no" for color in COLORS[:6]]  # teal and brown are left


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        # told by an answer
        (["what color is the shape? -> red", "what shape is present? -> circle"], "a red circle"),
        # told by the question
        (["what is the color of the triangle? -> gray"], "a gray triangle"),
        (["what is the blue shape? -> rectangle"], "a blue rectangle"),
        # told by a yes
        (["is there a red shape? -> yes", "does the image contain a circle? -> yes"], "a red circle"),
        # told by a no to a negation
        (["is there not a red shape? -> no", "does the image not contain a circle? -> no"], "a red circle"),
        (["is no teal shape present? -> no", "is no triangle present? -> no"], "a teal triangle"),
        # told by what is left
        (["what color is it? -> red", "is there a circle? -> no", "is no triangle present? -> yes"], "a red rectangle"),
        (["what shape is present? -> circle", *NOT_SIX, "is there not a teal shape? -> yes"], "a brown circle"),
        # not told
        (["what shape is present? -> circle", *NOT_SIX], None),
        (["what shape is present? -> circle"], None),
        (["what color is the shape? -> red"], None),
        (["what color is the shape? -> red", "is there a circle? -> no"], None),
        (["what color is the shape? -> red", "is there a circle? -> no", "is there a circle? -> no"], None),
        (["what color is the shape? -> red", "is there not a circle? -> yes"], None),
        (["is there a red shape? -> no", "is there a circle? -> yes"], None),
    ],
)
def test_what_the_answers_give_away(pairs, expected):
    assert caption(*pairs) == expected


def test_caption_row():
    row = load("train")[0][0]
    assert captions([row]) == [
        {
            "id": "train/0/caption",
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a blue rectangle"}],
        }
    ]


def test_captions_never_contradict_an_answer(split):
    name, rows, _ = split
    asked = {row["image"]: questions(row) for row in rows}
    made = captions(rows)
    assert len(made) == len({row["image"] for row in made}) == {"train": 3578, "test": 888}[name]
    for row in made:
        assert canonical(row, row["id"], max_images=1) is row
        article, color, shape = row["conversations"][1]["value"].split()
        assert article == "a" and color in COLORS and shape in SHAPES
        for question, answer in asked[row["image"]]:
            assert answer_of(question, color, shape) == answer, (row["image"], question)


def test_pictures_left_out_are_not_told_apart(split):
    """For every row without a caption, more than one picture fits its answers."""
    _, rows, _ = split
    captioned = {row["image"] for row in captions(rows)}
    for row in rows:
        if row["image"] not in captioned:
            fitting = [
                (color, shape)
                for color in COLORS
                for shape in SHAPES
                if all(answer_of(question, color, shape) == answer for question, answer in questions(row))
            ]
            assert len(fitting) > 1, row["id"]
