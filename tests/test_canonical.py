"""Rows of every spelling become LLaVA's, and what is wrong with the others is said."""

import pytest

from sparsecut_jax.data.conversation import canonical, images_of
from sparsecut_jax.types import CAUSES, BadSample
from test_conversation import QUESTIONS, gpt, human, row


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, []),
        ({"image": None}, []),
        ({"images": None}, []),
        ({"image": "a.png"}, ["a.png"]),
        ({"image": b"\x89PNG"}, [b"\x89PNG"]),
        ({"image": ["a.png", b"b"]}, ["a.png", b"b"]),
        ({"images": ["a.png"]}, ["a.png"]),
        ({"images": []}, []),
    ],
)
def test_images_of(more, expected):
    assert images_of({"conversations": [], **more}) == expected


@pytest.mark.parametrize(
    "good",
    [
        row("a", "b"),
        row("", "b"),
        row("a", "b", "c", "d", image=None),
        row("<image>", "b", image="a.png"),
        row("<image>", "b", image=b"bytes"),
        row("a <image>", "b", "<image>", "d", images=["a.png", "b.png"]),
        row("a", "the tag <image>"),
        row("a", "b", "c", "d", independent=True),
        row("<image><image>a", "b", "c", "d", independent=True, images=["a.png", "b.png"]),
        row("a", "b", system="Be brief."),
        {"conversations": [{**human("a"), "extra": [1]}, gpt("b")], "id": 7, "more": None},
        QUESTIONS,
        # LLaVA's 558k and 665k
        {
            "id": "004539375",
            "image": "00453/004539375.jpg",
            "conversations": [
                human("Render a clear and concise summary of the photo.\n<image>"),
                gpt("select furniture"),
            ],
        },
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": [
                human("<image>\nWhat are the colors?"),
                gpt("White and red."),
                human("Why?"),
                gpt("Paint."),
            ],
        },
        {"id": "wgByO4Y_0", "model": "", "conversations": [human("How to tell?"), gpt("By stars.")]},
    ],
)
def test_rows_that_stay_as_they_are(good):
    assert canonical(good, "r", max_images=2) is good


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text_part(text):
    return {"type": "text", "text": text}


PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"messages": [user("a"), assistant("b")]}, {"images": [], "conversations": [human("a"), gpt("b")]}),
        (
            {"id": 3, "messages": [user("<image>a"), assistant("b")], "images": ["x"], "model": "m"},
            {"id": 3, "images": ["x"], "conversations": [human("<image>a"), gpt("b")], "model": "m"},
        ),
        (
            {"messages": [user([PICTURE, text_part("a"), PICTURE]), assistant([text_part("b"), text_part("c")])],
             "images": ["x", b"y"]},
            {"images": ["x", b"y"], "conversations": [human("<image>a<image>"), gpt("bc")]},
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"from": "assistant", "value": "b", "kind": "k"}]},
            {"images": [], "conversations": [human("a"), {"from": "gpt", "value": "b", "kind": "k"}]},
        ),
        (
            {"messages": [{"role": "system", "content": "S"}, user("a"), assistant("b")]},
            {"images": [], "conversations": [human("a"), gpt("b")], "system": "S"},
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, gpt("hi"), human("a"), gpt("b")], "system": "old"},
            {"images": [], "conversations": [human("a"), gpt("b")], "system": "S"},
        ),
        (
            {"conversations": [{"from": "system", "value": ""}, human("a"), gpt("b")]},
            {"images": [], "conversations": [human("a"), gpt("b")]},
        ),
        (row("a", "b", system=None), {"id": "r", "images": [], "conversations": [human("a"), gpt("b")]}),
        (
            {"conversations": [gpt(""), human("a"), gpt("b"), human("c")]},
            {"images": [], "conversations": [human("a"), gpt("b")]},
        ),
        (
            row("<image>", "b", "<image>", images=["x", "y"]),
            {"id": "r", "images": ["x"], "conversations": [human("<image>"), gpt("b")]},
        ),
        (row("<image>", "b", "c", image="x"), {"id": "r", "images": ["x"], "conversations": [human("<image>"), gpt("b")]}),
    ],
)  # fmt: skip
def test_other_spellings(given, expected):
    found = canonical(given, "r", max_images=2)
    assert found == expected
    assert canonical(found, "r", max_images=2) is found


@pytest.mark.parametrize(
    ("bad", "cause", "expected"),
    [
        (None, "format", "expected an object, got NoneType"),
        ([row("a", "b")], "format", "expected an object, got list"),
        ({}, "format", "key 'conversations' must be a list with at least one turn"),
        ({"conversations": None}, "format", "key 'conversations' must be a list with at least one turn"),
        ({"messages": []}, "format", "key 'conversations' must be a list with at least one turn"),
        ({"conversations": {"0": 1}}, "format", "key 'conversations' must be a list with at least one turn"),
        (row("a", "b", image=3), "format", "key 'image' must be a path or a list of paths"),
        (row("a", "b", image=""), "format", "key 'image' must be a path or a list of paths"),
        (row("a", "b", image=["a.png", None]), "format", "key 'image' must be a path or a list of paths"),
        (row("a", "b", images={"a": 1}), "format", "key 'image' must be a path or a list of paths"),
        (
            row("<image>", "b", image="a.png", images=["b.png"]), "format",
            "both keys 'image' and 'images' are there; expected one of them",
        ),
        (row("a", "b", independent="yes"), "format", "key 'independent' must be true or false"),
        (row("a", "b", independent=1), "format", "key 'independent' must be true or false"),
        (row("a", "b", system=["S"]), "format", "key 'system' must be a text, got ['S']"),
        ({"conversations": [[human("a"), gpt("b")]]}, "format", "turn 0 must be an object, got list"),
        ({"conversations": [human("a"), {"from": "gpt"}]}, "format", "turn 1 must be an object with a text 'value'"),
        (row("a", "b", 3, "d"), "format", "turn 2 must be an object with a text 'value'"),
        (row("a", None), "format", "turn 1 must be an object with a text 'value'"),
        ({"messages": [user("a"), assistant(None)]}, "format", "turn 1 must be an object with a text 'content'"),
        ({"messages": [user([{"type": "video"}])]}, "format", "turn 0 must be an object with a text 'content'"),
        ({"messages": [user(["a"])]}, "format", "turn 0 must be an object with a text 'content'"),
        ({"messages": [user([text_part(None)])]}, "format", "turn 0 must be an object with a text 'content'"),
        ({"messages": [user("a"), assistant([PICTURE])]}, "format", "turn 1 must be an object with a text 'content'"),
        ({"conversations": [human("a"), {**gpt("b"), "kind": 1}]}, "format", "turn 1 has 'kind'=1, expected a text"),
        (row("a", "b", "c", "d") | {"conversations": [human("a"), human("a")]}, "roles", "turn 1 is of 'human', expected 'gpt'"),
        ({"conversations": [human("a"), gpt("b"), gpt("b")]}, "roles", "turn 2 is of 'gpt', expected 'human'"),
        ({"conversations": [gpt("a"), gpt("b")]}, "roles", "turn 1 is of 'gpt', expected 'human'"),
        (
            {"conversations": [human("a"), {"from": "system", "value": "S"}]}, "roles",
            "turn 1 is of 'system', expected 'gpt'",
        ),
        (
            {"conversations": [{"value": "a"}, gpt("b")]}, "roles",
            "turn 0 has 'from'=None, expected one of human, user, gpt, assistant, system",
        ),
        (
            {"messages": [{"role": ["user"], "content": "a"}]}, "roles",
            "turn 0 has 'role'=['user'], expected one of human, user, gpt, assistant, system",
        ),
        (row("a", ""), "no_answer", "turn 1 is an empty answer"),
        (row("a", "b", "c", " \n\t"), "no_answer", "turn 3 is an empty answer"),
        (row("a"), "no_answer", "there is no question with an answer"),
        ({"conversations": [gpt("a"), human("b")]}, "no_answer", "there is no question with an answer"),
        ({"conversations": [{"from": "system", "value": "S"}]}, "no_answer", "there is no question with an answer"),
        (row("a", "b", image="a.png"), "image_count", "0 <image> in the questions, but 1 images"),
        (row("a", "<image>", image="a.png"), "image_count", "0 <image> in the questions, but 1 images"),
        (row("<image>", "b"), "image_count", "1 <image> in the questions, but 0 images"),
        (row("<image>", "b", "<image>", "d", image="a.png"), "image_count", "2 <image> in the questions, but 1 images"),
        (row("<image>", "b", "<image>", image="a.png"), "image_count", "2 <image> in the questions, but 1 images"),
        (row("<image>" * 3, "b", image=["a.png"] * 3), "image_count", "3 images, but config.data.max_images=2"),
        (
            row("a", "b", "<image>", "d", image="a.png", independent=True), "image_count",
            "independent turns need every <image> at the start of the first question",
        ),
        (
            row("a <image>", "b", image="a.png", independent=True), "image_count",
            "independent turns need every <image> at the start of the first question",
        ),
        (
            row("<image> and <image>", "b", image=["a.png", "b.png"], independent=True), "image_count",
            "independent turns need every <image> at the start of the first question",
        ),
    ],
)  # fmt: skip
def test_bad_rows(bad, cause, expected):
    with pytest.raises(BadSample) as caught:
        canonical(bad, "file.json row 3", max_images=2)
    assert (caught.value.cause, str(caught.value)) == (cause, f"file.json row 3: {expected}")
    assert cause in CAUSES
