"""Rows from a JSON file and a folder: everything is checked before training starts."""

import json

import pytest
from PIL import Image

from sparsecut_jax.data.sources import Split, load_source
from sparsecut_jax.settings import DataConfig
from sparsecut_jax.types import UserError


def turns(question: str = "<image>\nwhat?", answer: str = "red") -> list:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def text_row(i) -> dict:
    return {"id": i, "conversations": turns(f"question {i}", f"answer {i}")}


@pytest.fixture
def load(tmp_path):
    """Function that writes rows (or the text of the file) and loads them; images/a.png and images/b.png exist."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())

    def write_and_load(rows, name: str = "mine.json", **settings):
        path = tmp_path / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            path.write_text(json.dumps(rows), encoding="utf-8")
        cfg = {"source": str(path), "images": str(tmp_path / "images"), "holdout": 0, "max_images": 2, **settings}
        return load_source(DataConfig(**cfg))

    return write_and_load


@pytest.fixture
def complaint(load, tmp_path):
    """Function like `load` for what must be refused; gives the sentence, with FILE and IMAGES for the paths."""

    def refused(rows, name: str = "mine.json", **settings) -> str:
        with pytest.raises(UserError) as caught:
            load(rows, name, **settings)
        sentence = str(caught.value)
        return sentence.replace(str(tmp_path / name), "FILE").replace(str((tmp_path / "images").resolve()), "IMAGES")

    return refused


# ----------------------------------------------------------------------------------------------------------------------
# good files


def test_rows_come_as_they_are(load, tmp_path):
    rows = [
        {"id": "1", "image": "a.png", "conversations": turns()},
        {"id": 2, "images": ["a.png", "b.png"], "conversations": turns("<image><image>"), "more": {"any": "thing"}},
        {"conversations": turns("Grüße?", "日本語 😀")},
    ]
    source = load(rows)
    assert source.name == "mine"
    assert source.train == Split(rows, str(tmp_path / "images"))
    assert source.holdout == source.test == Split([], str(tmp_path / "images"))
    assert source.test_name == "mine/holdout"


def test_both_kinds_of_stages_take_the_same_rows(load):
    source = load([text_row(0), text_row(1)])
    assert source.stage_rows("captions") == source.stage_rows("conversations") == source.train


def test_the_name_of_a_file_means_nothing(load):
    """Captions are made from answers for easy-VQA itself only."""
    source = load([text_row(0), text_row(1)], "easy_vqa.json")
    assert source.stage_rows("captions") == source.train


def test_text_rows_need_no_folder(load):
    assert len(load([text_row(0)], images="").train.rows) == 1


def test_texts_of_all_training_rows(load):
    texts = load([text_row(i) for i in range(4)], holdout=1).texts()
    kept = {text for text in texts if text.startswith("question")}
    assert len(kept) == 3
    assert {text.replace("question", "answer") for text in kept} == set(texts) - kept


def test_byte_order_mark(load):
    assert load(b"\xef\xbb\xbf" + json.dumps([text_row(0)]).encode()).train.rows == [text_row(0)]


def test_easy_vqa():
    source = load_source(DataConfig(holdout=200))
    assert (source.name, source.test_name) == ("easy_vqa", "easy_vqa/test")
    assert [len(split.rows) for split in (source.train, source.holdout, source.test)] == [3800, 200, 1000]
    assert source.stage_rows("conversations") == source.train
    captions = source.stage_rows("captions")
    assert captions.images == source.train.images != source.test.images
    assert 3000 < len(captions.rows) < 3800
    assert {row["image"] for row in captions.rows} <= {row["image"] for row in source.train.rows}
    assert all(row["id"].startswith("train/") for row in source.train.rows + source.holdout.rows)
    assert all(row["id"].startswith("test/") for row in source.test.rows)
    texts = source.texts()
    assert texts[0].startswith("<image>\n") and texts[-1].startswith("a ")


# ----------------------------------------------------------------------------------------------------------------------
# holdout


@pytest.mark.parametrize("holdout", [0, 1, 3, 9])
def test_holdout_is_disjoint_and_the_rest_is_all_there(load, holdout):
    source = load([text_row(i) for i in range(10)], holdout=holdout)
    kept, held = [[row["id"] for row in split.rows] for split in (source.train, source.holdout)]
    assert len(held) == holdout
    assert sorted(kept + held) == list(range(10))
    assert kept == sorted(kept) and held == sorted(held)
    assert source.test == source.holdout


def test_holdout_is_the_same_every_time(load):
    rows = [text_row(i) for i in range(30)]
    first, again = load(rows, holdout=5), load(rows, "other.json", holdout=5)
    assert first.holdout == again.holdout
    assert [row["id"] for row in first.holdout.rows] != list(range(5))
    more = load(rows, holdout=6)
    assert all(row in more.holdout.rows for row in first.holdout.rows)


def test_holdout_leaves_a_row_to_train_on(complaint):
    rows = [text_row(0), text_row(1)]
    expected = "config.data.holdout=2 rows cannot be kept out of the 2 of 'FILE'; expected at most 1"
    assert complaint(rows, holdout=2) == expected


# ----------------------------------------------------------------------------------------------------------------------
# bad files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "data source 'FILE' is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[1, 2", "data source 'FILE' is not valid JSON: Expecting ',' delimiter: line 1 column 6 (char 5)"),
        (b'{"id": 1}\n{"id": 2}', "data source 'FILE' is not valid JSON: Extra data: line 2 column 1 (char 10)"),
        (b'["\xe9"]', "data source 'FILE' is not valid JSON: 'utf-8' codec can't decode byte 0xe9 in position 2"),
        (b"{}", "data source 'FILE': expected a list of rows, got dict"),
        (b"[]", "data source 'FILE' is an empty list; expected at least one row"),
        (b"null", "data source 'FILE': expected a list of rows, got NoneType"),
        (b"NaN", "data source 'FILE': expected a list of rows, got float"),
        (b"[" * 100_000, "data source 'FILE' "),
        (b"[" + b"9" * 5000 + b"]", "data source 'FILE' "),
    ],
    ids=["empty", "cut", "lines", "latin", "object", "no rows", "null", "nan", "deep", "long number"],
)
def test_bad_file(complaint, content, expected):
    assert complaint(content).startswith(expected)


def test_source_that_is_no_file(tmp_path):
    for path, reason in {
        str(tmp_path): "is a folder; expected 'easy_vqa' or a JSON file of conversations",
        str(tmp_path / "no.json"): "is not there; expected 'easy_vqa' or a JSON file of conversations",
        "": "is not there; expected 'easy_vqa' or a JSON file of conversations",
    }.items():
        with pytest.raises(UserError) as caught:
            load_source(DataConfig(source=path))
        assert str(caught.value) == f"data source {path!r} {reason}"
    with pytest.raises(UserError, match="^data source "):
        load_source(DataConfig(source="a\0.json"))


# ----------------------------------------------------------------------------------------------------------------------
# bad rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (None, "FILE row 1 (id '?'): expected an object, got NoneType"),
        ([1], "FILE row 1 (id '?'): expected an object, got list"),
        ({"id": "x"}, "FILE row 1 (id 'x'): key 'conversations' must be a list with at least one turn"),
        (
            {"id": 7, "conversations": None},
            "FILE row 1 (id 7): key 'conversations' must be a list with at least one turn",
        ),
        (
            {"id": "x", "image": 3, "conversations": turns()},
            "FILE row 1 (id 'x'): key 'image' must be a path or a list of paths",
        ),
        ({"id": [1], "conversations": turns("a", " ")}, "FILE row 1 (id [1]): turn 1 is an empty answer"),
        ({"conversations": turns()}, "FILE row 1 (id '?'): 1 <image> in the questions, but 0 images"),
        (
            {"id": "x", "image": "a.png", "conversations": turns("what?")},
            "FILE row 1 (id 'x'): 0 <image> in the questions, but 1 images",
        ),
        (
            {"id": "x", "images": ["a.png"] * 3, "conversations": turns("<image>" * 3)},
            "FILE row 1 (id 'x'): 3 images, but config.data.max_images=2",
        ),
        (
            {"id": "x", "image": "c.png", "conversations": turns()},
            "FILE row 1 (id 'x'): image IMAGES/c.png is not there",
        ),
        (
            {"id": "x", "image": "../secret.png", "conversations": turns()},
            "FILE row 1 (id 'x'): image '../secret.png' leaves its folder IMAGES",
        ),
        (
            {"id": "x", "image": "/etc/hostname", "conversations": turns()},
            "FILE row 1 (id 'x'): image '/etc/hostname' leaves its folder IMAGES",
        ),
        (
            {"id": "x", "images": ["a.png", "c.png"], "conversations": turns("<image><image>")},
            "FILE row 1 (id 'x'): image IMAGES/c.png is not there",
        ),
    ],
)
def test_bad_row(complaint, row, expected):
    assert complaint([text_row(0), row, text_row(2)]) == expected


@pytest.mark.parametrize("name", ["", "a\0.png", "a" * 300, "\ud800.png"], ids=["empty", "nul", "long", "surrogate"])
def test_bad_name_of_an_image(complaint, name):
    sentence = complaint([{"id": "x", "image": name, "conversations": turns()}])
    assert sentence.startswith("FILE row 0 (id 'x'): ")


def test_image_without_a_folder(complaint):
    row = {"id": "x", "image": "a.png", "conversations": turns()}
    assert complaint([row], images="") == (
        "FILE row 0 (id 'x') has an image, but config.data.images, the folder of the images, is empty"
    )
