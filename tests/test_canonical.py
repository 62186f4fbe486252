"""Rows of every spelling become LLaVA's, and what is wrong with the others is said."""

import base64

import pytest

from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.text.conversation import images_of
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
        row("<image>", "b", image="a.png"),
        row("<image>", "b", image=b"bytes"),
        row("a <image>", "b", "<image>", "d", images=["a.png", "b.png"]),
        row("a", "the tag <image>"),
        row("a", "b", "c", "d", independent=True),
        row("<image><image>a", "b", "c", "d", independent=True, images=["a.png", "b.png"]),
        row("a", "b", system="Be brief."),
        {"conversations": [{**human("a"), "extra": [1]}, gpt("b")], "id": 7, "more": ""},
        row("a", "the tag <video>, or <audio>", system="<video>"),
        row("a", "b", video=[], audios="", images=[]),
        {"conversations": [human("a"), {**gpt("b"), "loss": False}, human("c"), gpt("d")]},
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
        (row("a", "b", system=None), {"id": "r", "conversations": [human("a"), gpt("b")]}),
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
        (row("a", "b", image=["a.png", 3]), "format", "key 'image' must be a path or a list of paths"),
        (row("<image><image>", "b", image=["a.png", None]), "image_count", "2 <image> in the questions, but 1 images"),
        (row("a", "b", images={"a": 1}), "format", "key 'image' must be a path or a list of paths"),
        (
            row("<image>", "b", image="a.png", images=["b.png"]), "format",
            "both keys 'image' and 'images' are present; expected only one",
        ),
        (
            row("a", "b", messages=[user("a"), assistant("b")]), "format",
            "both keys 'conversations' and 'messages' are present; expected only one",
        ),
        (row("a", "b", independent="yes"), "format", "key 'independent' must be true or false"),
        (row("a", "b", independent=1), "format", "key 'independent' must be true or false"),
        (row("a", "b", system=["S"]), "format", "key 'system' must be a string, got ['S']"),
        ({"conversations": [[human("a"), gpt("b")]]}, "format", "turn 0 must be an object, got list"),
        ({"conversations": [human("a"), {"from": "gpt"}]}, "format", "turn 1 must be an object with a string 'value'"),
        (row("a", "b", 3, "d"), "format", "turn 2 must be an object with a string 'value'"),
        (row("a", None), "format", "turn 1 must be an object with a string 'value'"),
        ({"messages": [user("a"), assistant(None)]}, "format", "turn 1 must be an object with a string 'content'"),
        ({"messages": [user(["a"])]}, "format", "turn 0 has a part 'a' in its content, expected texts and images"),
        ({"messages": [user([{"type": "x"}])]}, "format", "turn 0 has a part 'x' in its content, expected texts and images"),
        ({"messages": [user([text_part(None)])]}, "format", "turn 0 has a part 'text' in its content, expected texts and images"),
        ({"messages": [user("a"), assistant([PICTURE])]}, "format", "turn 1 has a part 'image' in its content, expected texts"),
        ({"conversations": [human("a"), {**gpt("b"), "kind": 1}]}, "format", "turn 1 has 'kind'=1, expected a string"),
        (row("a", "b", "c", "d") | {"conversations": [human("a"), human("a")]}, "roles", "turn 1 is from 'human', expected 'gpt'"),
        ({"conversations": [human("a"), gpt("b"), gpt("b")]}, "roles", "turn 2 is from 'gpt', expected 'human'"),
        ({"conversations": [gpt("a"), gpt("b")]}, "roles", "turn 1 is from 'gpt', expected 'human'"),
        (
            {"conversations": [human("a"), {"from": "system", "value": "S"}]}, "roles",
            "turn 1 is from 'system', expected 'gpt'",
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
        (row("a"), "no_answer", "no question has an answer"),
        ({"conversations": [gpt("a"), human("b")]}, "no_answer", "no question has an answer"),
        ({"conversations": [{"from": "system", "value": "S"}]}, "no_answer", "no question has an answer"),
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


# ----------------------------------------------------------------------------------------------------------------------
# null is absent

NAN = float("nan")


@pytest.mark.parametrize("null", [None, NAN, {"a": None}, {"a": {"b": None}, "c": NAN}])
@pytest.mark.parametrize("path", [False, True])
def test_null_is_absent_everywhere(null, path):
    """As pandas and `datasets` write rows of which each has some of the columns."""
    part = {"type": "text", "text": "a", "image": null, "image_url": null}
    one = {"type": "image", "text": null, "image": "x.png" if path else null, "url": null}
    given = {
        "id": null, "image": null, "images": null if path else ["x.png", null], "system": null, "video": null,
        "audios": [null], "independent": null, "conversations": null, "more": [{"k": null, "n": 1}],
        "messages": [
            {"role": "user", "content": [part, one], "from": null, "value": null, "loss": null, "kind": null},
            null,
            {"role": "assistant", "content": "b", "weight": null},
        ],
    }  # fmt: skip
    expected = {"audios": [], "more": [{"n": 1}], "images": ["x.png"], "conversations": [human("a<image>"), gpt("b")]}
    assert canonical(given, "r", max_images=1) == expected


@pytest.mark.parametrize("empty", [0, False, "", {}, []])
def test_what_is_empty_is_not_null(empty):
    given = row("a", "b", more=empty)
    assert canonical(given, "r", max_images=1) is given


def test_both_spellings_of_images_of_which_one_is_empty():
    given = row("<image>", "b", image="x.png", images=[], messages=[])
    assert canonical(given, "r", 1) == row("<image>", "b", images=["x.png"])


# ----------------------------------------------------------------------------------------------------------------------
# images

DATA = b"\x89PNG\r\n\x1a\n" + bytes(range(40))
B64 = base64.b64encode(DATA).decode()
HOLDINGS = [
    ("a/b.png", "a/b.png"),
    ("/a/b.png", "/a/b.png"),
    ("file:///a/b%20c.png", "/a/b c.png"),
    ("iVBORw0KGgo.png", "iVBORw0KGgo.png"),
    (B64, DATA),
    (B64[:20] + "\n" + B64[20:] + "\n", DATA),
    (f"data:image/png;base64,{B64}", DATA),
    (f"DATA:image/png;charset=utf-8;base64,{B64}", DATA),
    ({"bytes": DATA, "path": None}, DATA),
    ({"bytes": DATA, "path": "a.png"}, DATA),
    ({"bytes": B64, "path": "a.png"}, DATA),
    ({"bytes": None, "path": "a.png"}, "a.png"),
    ({"url": "a.png"}, "a.png"),
]


@pytest.mark.parametrize(("holding", "expected"), HOLDINGS)
def test_an_image_beside_the_turns_or_in_a_part(holding, expected):
    turns = [human("<image>a"), gpt("b")]
    for key, value in (("image", holding), ("images", [holding])):
        found = canonical({"conversations": turns, key: value}, "r", 1)
        assert images_of(found) == [expected] and found["conversations"] == turns
    parts = [{"type": "image", "image": holding}]
    if isinstance(holding, str):
        parts += [{"type": "image", key: holding} for key in ("url", "path")]
        parts += [{"type": kind, "image_url": holding} for kind in ("image_url", "input_image")]
        parts += [{"type": "image_url", "image_url": {"url": holding, "detail": "low"}}]
    for part in parts:
        found = canonical({"messages": [user([part, text_part("a")]), assistant("b")]}, "r", 1)
        assert found == {"images": [expected], "conversations": turns}
        assert canonical(found, "r", 1) is found


def test_images_of_parts_come_in_order():
    url = lambda name: {"type": "image_url", "image_url": {"url": name}}
    turns = [
        user([url("1.png"), {"type": "input_text", "text": " or "}, url("2.png")]),
        assistant([{"type": "output_text", "text": "b"}]),
        user("why?"),
        assistant("c"),
        user([text_part("and "), url("3.png")]),
        assistant("d"),
        user([url("4.png")]),
    ]
    assert canonical({"messages": turns}, "r", 3) == {
        "images": ["1.png", "2.png", "3.png"],
        "conversations": [
            human("<image> or <image>"),
            gpt("b"),
            human("why?"),
            gpt("c"),
            human("and <image>"),
            gpt("d"),
        ],
    }


REMOTE = " is a URL, and images are not downloaded; download it into the image folder and give its path"


@pytest.mark.parametrize(
    ("image", "cause", "expected"),
    [
        ("https://a.org/b.png", "remote_image", "image 'https://a.org/b.png'" + REMOTE),
        ("HTTP://a.org/b.png", "remote_image", "image 'HTTP://a.org/b.png'" + REMOTE),
        ("s3://a/b.png", "remote_image", "image 's3://a/b.png'" + REMOTE),
        ("data:image/png;base64,iVBO?", "broken_image", "the data URL of an image is not valid: Only base64 data is allowed"),
        ("data:image/png;base64,iVBOR", "broken_image", "the data URL of an image is not valid: Invalid base64-encoded string: number of data characters (5) cannot be 1 more than a multiple of 4"),
        ("data:image/png;base64,", "broken_image", "the data URL of an image is empty"),
        ("data:text/html;base64,iVBO", "broken_image", "an image is a data URL of type 'text/html', expected image/..."),
        ("data:image/svg+xml,%3Csvg", "broken_image", "an image is a data URL without ;base64: 'data:image/svg+xml,%3Csvg'"),
        ({"bytes": "a b?"}, "broken_image", "the base64 of an image is not valid: Only base64 data is allowed"),
    ],
)  # fmt: skip
def test_images_that_are_refused(image, cause, expected):
    for given in (
        {"conversations": [human("<image>"), gpt("b")], "image": image},
        {"messages": [user([{"type": "image", "image": image}]), assistant("b")]},
    ):
        with pytest.raises(BadSample) as caught:
            canonical(given, "r", 1)
        assert (caught.value.cause, str(caught.value)) == (cause, f"r: {expected}") and cause in CAUSES


@pytest.mark.parametrize(
    ("parts", "more", "cause", "expected"),
    [
        ([{**PICTURE, "image": "x"}, PICTURE], {}, "image_count", "2 <image> in the questions, but 1 images"),
        ([{**PICTURE, "image": "x"}, text_part("<image>")], {}, "image_count", "2 <image> in the questions, but 1 images"),
        (
            [{**PICTURE, "image": "x"}], {"image": "x"}, "image_count",
            "turn 0 has its own image, but the row has key 'image' or 'images' as well",
        ),
        (
            [{**PICTURE, "image": "x", "url": "y"}], {}, "format",
            "turn 0 has an image part with keys type, image, url; expected exactly one of "
            "bytes, base64, image, image_url, url, path, with a path or an encoded image",
        ),
        (
            [{**PICTURE, "image": 3}], {}, "format", "turn 0 has an image part with keys type, image; expected exactly one of "
            "bytes, base64, image, image_url, url, path, with a path or an encoded image",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_agree(parts, more, cause, expected):
    with pytest.raises(BadSample) as caught:
        canonical({"messages": [user(parts), assistant("b")], **more}, "r", 2)
    assert (caught.value.cause, str(caught.value)) == (cause, f"r: {expected}")


# ----------------------------------------------------------------------------------------------------------------------
# other media


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (row("what?", "b", video="a.mp4"), "key 'video' is present"),
        (row("what?", "b", videos=["a.mp4"]), "key 'videos' is present"),
        (row("what?", "b", audio={"path": "a.wav"}), "key 'audio' is present"),
        (row("what?", "b", audios=["a.wav"], image="x"), "key 'audios' is present"),
        (row("<video>\nwhat?", "b"), "turn 0 has a <video>"),
        (row("what?", "b", "<audio>", "d"), "turn 2 has a <audio>"),
        ({"messages": [user([{"type": "video", "video": "a.mp4"}])]}, "turn 0 has a part of type 'video'"),
        ({"messages": [user([{"type": "video_url", "video_url": {}}])]}, "turn 0 has a part of type 'video_url'"),
        ({"messages": [user([{"type": "input_audio"}])]}, "turn 0 has a part of type 'input_audio'"),
        ({"messages": [user("<video>"), assistant("b")]}, "turn 0 has a <video>"),
    ],
)
def test_videos_and_sounds_are_named(given, what):
    with pytest.raises(BadSample) as caught:
        canonical(given, "r", 1)
    assert caught.value.cause == "unsupported" and "unsupported" in CAUSES
    assert str(caught.value) == f"r: {what}, but only text and images are supported, not video or audio"


# ----------------------------------------------------------------------------------------------------------------------
# what is trained on


@pytest.mark.parametrize(
    "no", [{"loss": False}, {"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": 0, "weight": 0}]
)
def test_an_answer_that_is_not_trained_on(no):
    yes = dict.fromkeys(no, 1)
    given = {"messages": [user("a"), {**assistant("b"), **no}, {**user("c"), **no}, {**assistant("d"), **yes}]}
    assert canonical(given, "r", 1) == {
        "images": [],
        "conversations": [human("a"), {**gpt("b"), "loss": False}, human("c"), gpt("d")],
    }


@pytest.mark.parametrize(
    ("turns", "cause", "expected"),
    [
        ([human("a"), {**gpt("b"), "weight": 0.5}], "format", "turn 1 has 'weight'=0.5, expected 0 or 1; other weights are not supported"),
        ([human("a"), {**gpt("b"), "loss": "no"}], "format", "turn 1 has 'loss'='no', expected true or false"),
        ([human("a"), {**gpt("b"), "loss": True, "weight": 0}], "format", "turn 1 contradicts itself: loss=True, weight=0"),
        ([{**human("a"), "loss": True}, gpt("b")], "format", "turn 0 from 'human' has 'loss'=True, but only answers are trained on"),
        ([human("a"), {**gpt("b"), "loss": False}], "no_loss", "every answer has loss=false or weight=0, so there is nothing to train on"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on(turns, cause, expected):
    with pytest.raises(BadSample) as caught:
        canonical({"conversations": turns}, "r", 1)
    assert (caught.value.cause, str(caught.value)) == (cause, f"r: {expected}") and cause in CAUSES
