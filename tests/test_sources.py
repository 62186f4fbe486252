"""What `config.data` names becomes parts of numbered rows: for training, held out, and to test on."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from sparsecut_jax.config import Config
from sparsecut_jax.data import sources
from sparsecut_jax.data.parts import Folder, Part, Split
from sparsecut_jax.data.rows import JsonRows
from sparsecut_jax.data.sources import load_source
from sparsecut_jax.settings import DataConfig, ScenesConfig, SourceConfig, StageConfig
from sparsecut_jax.types import BadSample, UserError

CONVERSATIONS, CAPTIONS = StageConfig(), StageConfig(rows="captions")


def turns(question: str = "<image>\nwhat?", answer: str = "red") -> list:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def text_row(i, **more) -> dict:
    return {"id": i, "conversations": turns(f"question {i}", f"answer {i}"), **more}


def image_row(name: str, i="x") -> dict:
    return {"id": i, "image": name, "conversations": turns()}


def rows_of(part: Part) -> list[dict]:
    return [part.row(i) for i in range(len(part))]


def row_of(split: Split, i: int) -> dict:
    part, local = split.find(i)
    return part.row(local)


def ids(part: Part) -> list:
    return [row["id"] for row in rows_of(part)]


@pytest.fixture
def load(tmp_path):
    """Function that writes files of rows and loads them; images/a.png and images/b.png exist.

    One list is the file mine.json, a dictionary of lists is a mixture.
    """
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())

    def write(rows, name: str) -> str:
        path = tmp_path / f"{name}.json"
        path.write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows).encode())
        return str(path)

    def write_and_load(rows, weights=None, **settings):
        data = {"images": str(tmp_path / "images"), "holdout": 0, "max_images": 2, **settings}
        if isinstance(rows, dict):
            weights = weights or {}
            data["mix"] = {
                name: SourceConfig(write(found, name), data["images"], weights.get(name, 1.0))
                for name, found in rows.items()
            }
        else:
            data["source"] = write(rows, "mine")
        return load_source(Config(data=DataConfig(**data)))

    return write_and_load


# ----------------------------------------------------------------------------------------------------------------------
# one file


def test_rows_come_as_they_are(load):
    rows = [
        {"id": "1", "image": "a.png", "conversations": turns()},
        {"id": 2, "images": ["a.png", "b.png"], "conversations": turns("<image><image>"), "more": {"any": "thing"}},
        {"conversations": turns("Grüße?", "日本語 😀")},
        {"id": 3, "image": "a.png", "independent": True, "conversations": turns() + turns("\nwho?", "me")},
    ]
    source = load(rows)
    assert source.name == "mine"
    assert list(source.train) == list(source.holdout) == [""]
    assert rows_of(source.train[""]) == rows
    assert len(source.holdout[""]) == 0 and source.tests == {}
    assert source.fingerprint == JsonRows(source.train[""].name).fingerprint()


def test_llava_pretraining_row(load):
    """As in blip_laion_cc_sbu_558k.json."""
    row = {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
        ],
    }
    assert rows_of(load([row]).train[""]) == [row]


def test_llava_instruction_rows(load):
    """As in llava_v1_5_mix665k.json: several turns, a text-only row with a `model`, an answer before any question."""
    image = {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    }
    text = {"id": "wgByO4Y_0", "model": "", "conversations": turns("how can I?", "like this")}
    shared = {"id": "x_1", "conversations": [{"from": "gpt", "value": "earlier"}, *turns("go on", "so it is")]}
    found = rows_of(load([image, text, shared]).train[""])
    assert found == [image, text, {"id": "x_1", "images": [], "conversations": turns("go on", "so it is")}]


def test_other_spelling(load):
    row = {
        "id": "m",
        "images": ["a.png"],
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
    }
    assert rows_of(load([row]).train[""]) == [
        {"id": "m", "images": ["a.png"], "system": "be brief", "conversations": turns("<image>what?")}
    ]


def test_both_kinds_of_stages_take_the_same_rows(load):
    source = load([text_row(0), text_row(1)])
    assert source.stage(CAPTIONS).parts == source.stage(CONVERSATIONS).parts == (source.train[""],)


def test_lines_and_a_byte_order_mark(load):
    assert ids(load(b"\xef\xbb\xbf" + json.dumps([text_row(0)]).encode()).train[""]) == [0]
    assert ids(load("\n".join(json.dumps(text_row(i)) for i in range(3)).encode()).train[""]) == [0, 1, 2]


def test_fingerprint_changes_with_the_content(load):
    first = load([text_row(0), text_row(1)]).fingerprint
    assert load([text_row(0), text_row(1)], holdout=1).fingerprint == first
    assert load([text_row(0), text_row(2)]).fingerprint != first
    mixed = load({"a": [text_row(0), text_row(1)], "b": [text_row(2)]}).fingerprint
    assert mixed.startswith(first + "; 1 rows, sha256 ")


# ----------------------------------------------------------------------------------------------------------------------
# what a tokenizer is trained on


def test_texts_are_those_of_training_rows_that_can_be_read(load):
    source = load([*(text_row(i) for i in range(9)), {"id": 9}], holdout=2)
    kept = [n for n in map(source.train[""].number, range(8)) if n != 9]
    assert list(source.texts()) == [text for n in kept for text in (f"question {n}", f"answer {n}")]


def test_texts_of_all_sources_within_the_limit(load, monkeypatch):
    rows = {"a": [text_row(f"a{i:04}") for i in range(300)], "b": [text_row(f"b{i:04}") for i in range(100)]}
    monkeypatch.setattr(sources, "TOKENIZER_TEXT", 26 * 40)  # of rows with 26 characters
    texts = list(load(rows).texts())
    assert texts[:2] == ["question a0000", "answer a0000"]
    assert [sum(name in text for text in texts) for name in ("question a", "question b")] == [30, 10]


def test_what_one_source_leaves_is_for_the_next(load, monkeypatch):
    rows = {"a": [{"id": i} for i in range(300)], "b": [text_row(f"b{i:04}") for i in range(100)]}
    monkeypatch.setattr(sources, "TOKENIZER_TEXT", 26 * 40)
    assert len(list(load(rows).texts())) == 2 * 40


def test_texts_of_many_rows_leave_no_region_out():
    assert list(sources._spread(5)) == [0, 1, 2, 3, 4]
    spread = list(sources._spread(30_000))
    assert spread[:3] == [0, 3, 6] and spread[9_999:10_002] == [29_997, 1, 4]
    assert sorted(spread) == list(range(30_000))


# ----------------------------------------------------------------------------------------------------------------------
# several sources


def test_mixture(load, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (7, 5)).save(other / "a.png")
    load({"a": [image_row("a.png", i) for i in range(3)], "b": [text_row(i) for i in range(2)]})
    mix = {
        "first": SourceConfig(str(tmp_path / "a.json"), str(tmp_path / "images"), weight=2.0),
        "second": SourceConfig(str(tmp_path / "a.json"), str(other), weight=0.5),
        "words": SourceConfig(str(tmp_path / "b.json")),
    }
    source = load_source(Config(data=DataConfig(mix=mix, holdout=0)))
    assert source.name == "a+a+b"
    assert list(source.train) == ["first", "second", "words"]
    split = source.stage(CONVERSATIONS)
    assert len(split) == 8 and split.ends == [3, 6, 8]
    assert [part.weight for part in split.parts] == [2.0, 0.5, 1.0]
    assert [split.find(i) for i in (0, 2, 3, 7)] == [
        (source.train["first"], 0),
        (source.train["first"], 2),
        (source.train["second"], 0),
        (source.train["words"], 1),
    ]
    found = [(part, part.row(local)) for part, local in map(split.find, (1, 4, 7))]
    sizes = [part.pictures.open(row["image"]).size for part, row in found[:2]]
    assert sizes == [(4, 4), (7, 5)]
    assert found[2][1] == text_row(1)
    with pytest.raises(IndexError):
        split.find(8)


def test_rows_of_a_stage(load):
    source = load({"a": [text_row(0)], "b": [text_row(1), text_row(2)], "c": [text_row(3)]})
    split = source.stage(StageConfig(sources=("c", "a")))
    assert [part.row(0)["id"] for part in split.parts] == [3, 0]
    assert len(source.stage(StageConfig())) == 4


def test_groups(load):
    rows = {"a": [text_row(0)] * 3, "b": [text_row(1)] * 2, "c": [text_row(2)] * 2}
    split = load(rows, {"b": 0.5}).stage(StageConfig())
    groups = split.groups(np.array([0, 2, 4, 6]))
    assert [(rows.tolist(), weight) for rows, weight in groups] == [([0, 2], 1.0), ([4], 0.5), ([6], 1.0)]
    assert [rows.tolist() for rows, _ in split.groups(np.array([5, 6]))] == [[], [], [5, 6]]


def test_no_part_no_rows():
    assert len(Split(())) == 0


def test_names_of_tests(load):
    assert list(load([text_row(i) for i in range(5)], holdout=1).tests) == ["mine/holdout"]
    source = load({"a": [text_row(i) for i in range(9)], "b": [text_row(0)]}, holdout=2)
    assert list(source.tests) == ["a/holdout"]
    mix = {"shapes": SourceConfig("easy_vqa"), "a": SourceConfig(source.train["a"].name)}
    source = load_source(Config(data=DataConfig(mix=mix, holdout=401)))
    assert list(source.tests) == ["shapes/test", "a/holdout"]
    assert source.name == "easy_vqa+a"


# ----------------------------------------------------------------------------------------------------------------------
# holdout


@pytest.mark.parametrize("holdout", [0, 1, 3, 9])
def test_holdout_is_disjoint_and_the_rest_is_all_there(load, holdout):
    source = load([text_row(i) for i in range(10)], holdout=holdout)
    kept, held = ids(source.train[""]), ids(source.holdout[""])
    assert len(held) == holdout
    assert sorted(kept + held) == list(range(10))
    assert kept == sorted(kept) and held == sorted(held)
    assert source.tests == ({"mine/holdout": source.holdout[""]} if holdout else {})


def test_holdout_is_the_same_every_time(load):
    rows = [text_row(i) for i in range(30)]
    first = load(rows, holdout=5).holdout[""]
    assert ids(load(rows, holdout=5).holdout[""]) == ids(first) != list(range(5))
    assert set(ids(first)) < set(ids(load(rows, holdout=6).holdout[""]))


@pytest.mark.parametrize(
    ("sizes", "holdout", "expected"),
    [
        ((30, 10, 20), 6, [3, 1, 2]),
        ((10, 10), 1, [0, 1]),
        ((10, 10), 5, [2, 3]),
        ((1, 99), 60, [0, 60]),
        ((1, 1, 2), 3, [0, 0, 1]),  # of every source something stays to train on
    ],
)
def test_holdout_of_every_source_its_share(load, sizes, holdout, expected):
    rows = {name: [text_row(f"{name}{i}") for i in range(n)] for name, n in zip("abc", sizes, strict=False)}
    source = load(rows, holdout=holdout)
    assert [len(part) for part in source.holdout.values()] == expected
    for name, n in zip("abc", sizes, strict=False):
        assert sorted(ids(source.train[name]) + ids(source.holdout[name])) == sorted(f"{name}{i}" for i in range(n))
    split = source.stage(StageConfig(), holdout=True)
    assert [row_of(split, i)["id"] for i in range(len(split))] == sum(map(ids, source.holdout.values()), [])


@pytest.mark.parametrize(
    ("rows", "held"), [(1, 0), (2, 1), (9, 1), (12, 2), (50, 10), (200, 10), (400, 20), (20_000, 500)]
)
def test_holdout_follows_the_number_of_rows(rows, held):
    part = Part("mine", [text_row(0)] * rows, Folder("", 1), 1)
    kept, out = sources._hold_out({"": part}, DataConfig(holdout=-1))
    assert (len(kept[""]), len(out[""])) == (rows - held, held)


def test_a_file_of_test_rows(load, tmp_path):
    """It is what is tested on, whatever else there would be; its images may be in another folder."""
    (tmp_path / "hard.json").write_text(json.dumps([image_row("b.png", 7)]))
    source = load([text_row(i) for i in range(9)], holdout=2, test=str(tmp_path / "hard.json"))
    assert list(source.tests) == ["hard/test"] and ids(source.tests["hard/test"]) == [7]
    assert source.tests["hard/test"].pictures.path == str(tmp_path / "images")
    source = load([text_row(0)], test=str(tmp_path / "hard.json"), test_images=str(tmp_path))
    assert source.tests["hard/test"].pictures.path == str(tmp_path)
    source = load({"a": [text_row(0)], "b": [text_row(1)]}, test="easy_vqa")
    assert [(name, len(part)) for name, part in source.tests.items()] == [("easy_vqa/test", 1000)]
    with pytest.raises(UserError) as caught:
        load([text_row(0)], test="scenes", test_images="pictures")
    assert str(caught.value) == (
        "config.data.test_images='pictures' (--images of evaluate) has no effect with 'scenes', which has its own images; "
        "leave it out"
    )
    no_folder = load([text_row(0)], images="", test=str(tmp_path / "hard.json"))
    with pytest.raises(
        BadSample, match=r"config\.data\.test_images \(--images of evaluate\), the folder of the images, is empty"
    ):
        no_folder.tests["hard/test"].row(0)


def test_holdout_leaves_a_row_to_train_on(load, tmp_path):
    with pytest.raises(UserError) as caught:
        load([text_row(0), text_row(1)], holdout=2)
    expected = f"config.data.holdout=2 rows cannot be held out of the 2 of {str(tmp_path / 'mine.json')!r}"
    assert str(caught.value) == expected + "; expected at most 1"
    with pytest.raises(UserError) as caught:
        load({"a": [text_row(0)], "b": [text_row(1)]}, holdout=7)
    assert str(caught.value) == (
        "config.data.holdout=7 rows cannot be held out of the 2 of config.data.mix; expected at most 1"
    )


def test_rows_are_called_by_their_number_in_the_file(load, tmp_path):
    rows = [{"id": f"r{i}"} for i in range(20)]
    source = load(rows, holdout=5)
    for part in (source.train[""], source.holdout[""]):
        for i in range(len(part)):
            n = part.number(i)
            assert part.label(i, rows[n]) == f"{tmp_path / 'mine.json'} row {n} (id 'r{n}')"
            with pytest.raises(BadSample, match=f"mine.json row {n} \\(id 'r{n}'\\): key 'conversations' must be"):
                part.row(i)


def test_some_rows_of_some_rows(load):
    part = load([text_row(i) for i in range(10)]).train[""].take([7, 3, 5])
    assert ids(part) == [7, 3, 5] and [part.number(i) for i in range(3)] == [7, 3, 5]


def test_what_goes_to_other_processes_is_small(load):
    split = load({"a": [text_row(i) for i in range(3000)], "b": [text_row(0)] * 2000}, holdout=9).stage(StageConfig())
    sent = pickle.dumps(split)
    assert len(sent) < 5000
    assert row_of(pickle.loads(sent), 4000) == row_of(split, 4000)


# ----------------------------------------------------------------------------------------------------------------------
# easy-VQA and Scenes


def test_easy_vqa():
    source = load_source(Config(data=DataConfig(holdout=200)))
    assert source.name == "easy_vqa"
    (train,), (held,) = source.train.values(), source.holdout.values()
    assert list(source.tests) == ["easy_vqa/test"]
    assert [len(part) for part in (train, held, source.tests["easy_vqa/test"])] == [3800, 200, 1000]
    assert source.fingerprint == "4000 rows, sha256 74ee14bba8c6b8d3"
    assert source.stage(CONVERSATIONS).parts == (train,)
    assert all(name.startswith("train/") for name in ids(train) + ids(held))
    assert all(name.startswith("test/") for name in ids(source.tests["easy_vqa/test"]))
    (captions,) = source.stage(CAPTIONS).parts
    assert len(captions) == 3399 and captions.captions is None
    assert captions.pictures == train.pictures != source.tests["easy_vqa/test"].pictures
    assert {row["image"] for row in rows_of(captions)} <= {row["image"] for row in rows_of(train)}
    assert captions.row(5)["id"] == "train/6/caption" and captions.label(5, captions.row(5)) == (
        "easy_vqa row 5 (id 'train/6/caption')"  # rows without a caption are not counted
    )
    texts = list(source.texts())
    assert texts[0].startswith("<image>\n") and texts[-1].startswith("a ")


def test_captions_of_all_of_easy_vqa():
    source = load_source(Config(data=DataConfig(holdout=0)))
    assert [len(source.stage(stage)) for stage in (CONVERSATIONS, CAPTIONS)] == [4000, 3578]
    assert len(source.stage(CAPTIONS, holdout=True)) == 0


def test_scenes():
    data = DataConfig(source="scenes", scenes=ScenesConfig(train=40, test=8), holdout=4)
    source = load_source(Config(data=data))
    assert source.name == "scenes" and list(source.tests) == ["scenes/test"]
    (train,), (held,) = source.train.values(), source.holdout.values()
    assert [len(part) for part in (train, held, source.tests["scenes/test"])] == [36, 4, 8]
    split = source.stage(CAPTIONS)
    assert len(split) == 36
    for i in (0, 7, 35):
        n = train.number(i)
        row = row_of(split, i)
        assert (train.row(i)["id"], row["id"]) == (f"train/{n}", f"train/{n}/caption")
        assert split.parts[0].label(i, row) == f"scenes row {n} (id 'train/{n}/caption')"
        assert len(row["conversations"]) == 2
    assert row_of(pickle.loads(pickle.dumps(split)), 7) == row_of(split, 7)
    assert split.parts[0].pictures.open(row_of(split, 0)["image"]).size == (64, 64)
    other = dataclasses.replace(data, scenes=ScenesConfig(train=40, test=8, seed=1))
    assert load_source(Config(data=other)).fingerprint != source.fingerprint
    assert len(list(source.texts())) == 36 * 24 + 36 * 2


# ----------------------------------------------------------------------------------------------------------------------
# bad rows


@pytest.mark.parametrize(
    ("row", "cause", "expected"),
    [
        (None, "format", "FILE row 1: expected an object, got NoneType"),
        ([1], "format", "FILE row 1: expected an object, got list"),
        ({"id": "x"}, "format", "FILE row 1 (id 'x'): key 'conversations' must be a list with at least one turn"),
        (
            {"id": 7, "conversations": None},
            "format",
            "FILE row 1 (id 7): key 'conversations' must be a list with at least one turn",
        ),
        (image_row(3), "format", "FILE row 1 (id 'x'): key 'image' must be a path or a list of paths"),
        (image_row(""), "format", "FILE row 1 (id 'x'): key 'image' must be a path or a list of paths"),
        ({"id": [1], "conversations": turns("a", " ")}, "no_answer", "FILE row 1 (id [1]): turn 1 is an empty answer"),
        ({"conversations": turns()}, "image_count", "FILE row 1: 1 <image> in the questions, but 0 images"),
        (
            {"id": "x", "image": "a.png", "conversations": turns("what?")},
            "image_count",
            "FILE row 1 (id 'x'): 0 <image> in the questions, but 1 images",
        ),
        (
            {"id": "x", "images": ["a.png"] * 3, "conversations": turns("<image>" * 3)},
            "image_count",
            "FILE row 1 (id 'x'): 3 images, but config.data.max_images=2",
        ),
        (
            {"id": "x", "conversations": turns()[::-1][:1] * 2},
            "roles",
            "FILE row 1 (id 'x'): turn 1 is from 'gpt', expected 'human'",
        ),
        (
            image_row("../secret.png"),
            "path",
            "FILE row 1 (id 'x'): image '../secret.png' leaves its folder IMAGES",
        ),
        (
            image_row("/etc/hostname"),
            "path",
            "FILE row 1 (id 'x'): image '/etc/hostname' leaves its folder IMAGES",
        ),
        (image_row("a\0.png"), "path", "FILE row 1 (id 'x'): image 'a\\x00.png' in 'IMAGES' is not a valid file"),
        (
            image_row("\ud800.png"),
            "path",
            "FILE row 1 (id 'x'): image '\\ud800.png' in 'IMAGES' is not a valid file",
        ),
        (image_row("c.png"), "missing_image", "image IMAGES/c.png does not exist"),
        (image_row("a" * 300), "missing_image", "image IMAGES/aaa"),
        (
            {"id": "x", "images": ["a.png", "c.png"], "conversations": turns("<image><image>")},
            "missing_image",
            "image IMAGES/c.png does not exist",
        ),
    ],
)
def test_bad_row(load, tmp_path, row, cause, expected):
    """Pictures are looked for by `look`, whose sentence the walk completes."""
    lines = "\n".join(json.dumps(r) for r in (text_row(0), row, text_row(2)))
    part = load(lines.encode()).train[""]
    assert part.row(0) == text_row(0) and part.row(2) == text_row(2)
    for decode in (False, True):
        with pytest.raises(BadSample) as caught:
            read = part.row(1)
            for entry in read.get("images", [read.get("image")]):
                part.look(entry, decode)
        sentence = str(caught.value).replace(str(tmp_path / "mine.json"), "FILE")
        sentence = sentence.replace(str((tmp_path / "images").resolve()), "IMAGES")
        assert caught.value.cause == cause
        assert sentence.startswith(expected)


def test_a_row_that_is_no_json(load, tmp_path):
    part = load(b'[{"id": 0}, {"id": 1, "conversations": nope}]', holdout=0).train[""]
    with pytest.raises(BadSample) as caught:
        part.row(1)
    assert caught.value.cause == "text"
    assert str(caught.value) == (
        f"{tmp_path / 'mine.json'} row 1: it is not valid JSON: Expecting value: line 1 column 28 (char 27)"
    )


def test_image_without_a_folder(load):
    row = image_row("a.png")
    for rows, name, setting in (([row], "", "config.data.images"), ({"m": [row]}, "m", "config.data.mix.m.images")):
        part = load(rows, images="").train[name]
        with pytest.raises(BadSample) as caught:
            part.row(0)
        assert caught.value.cause == "missing_image"
        assert str(caught.value) == (
            f"{part.name} row 0 (id 'x'): it has an image, but {setting}, the folder of the images, is empty"
        )
    assert ids(load([text_row(0)], images="").train[""]) == [0]


def test_pictures_of_a_part(load, tmp_path):
    (tmp_path / "images" / "broken.png").write_bytes(b"<html>")
    part = load([image_row("a.png"), image_row("broken.png")]).train[""]
    content = (tmp_path / "images" / "a.png").read_bytes()
    assert part.encoded("a.png") == part.encoded(content) == content
    assert part.pictures.open("a.png").size == part.pictures.open(content).size == (4, 4)
    part.look("a.png", decode=True)
    part.look(content, decode=True)
    part.look(b"<html>", decode=False)
    part.look("broken.png", decode=False)
    for entry in ("broken.png", b"<html>"):
        with pytest.raises(BadSample) as caught:
            part.look(entry, decode=True)
        assert caught.value.cause == "broken_image"
        with pytest.raises(BadSample) as caught:  # so that `data build` packs none of them
            part.encoded(entry)
        assert caught.value.cause == "broken_image"
    with pytest.raises(BadSample) as caught:
        part.encoded("c.png")
    assert caught.value.cause == "missing_image"


def test_links_are_followed_by_a_setting(load, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "far.png")
    (tmp_path / "images" / "linked").symlink_to("../elsewhere")
    row = image_row("linked/far.png")
    for rows, name in (([row], ""), ({"m": [row]}, "m")):
        assert load(rows, follow_links=True).train[name].pictures.open("linked/far.png").size == (4, 4)
        with pytest.raises(BadSample, match="set config.data.follow_links=True .* to follow such links$"):
            load(rows).train[name].pictures.open("linked/far.png")


def test_picture_with_too_many_pixels(load):
    part = load([image_row("a.png")], max_pixels=15).train[""]
    assert part.pictures == Folder(part.pictures.path, 15, "config.data.images")
    with pytest.raises(BadSample) as caught:
        part.look("a.png", decode=True)
    assert caught.value.cause == "too_large_image"


# ----------------------------------------------------------------------------------------------------------------------
# what is no source


def test_source_that_is_not_there(tmp_path):
    for path in (str(tmp_path / "no.json"), "", "easy-vqa", "a\0.json"):
        with pytest.raises(UserError) as caught:
            load_source(Config(data=DataConfig(source=path)))
        assert str(caught.value).startswith(f"data source {path!r} does not exist; expected 'easy_vqa', 'scenes', ")


def test_a_folder_without_a_dataset(tmp_path):
    (tmp_path / "rows-1.json").write_text("[]")
    with pytest.raises(UserError) as caught:
        load_source(Config(data=DataConfig(source=str(tmp_path))))
    assert str(caught.value) == (
        f"{tmp_path} is not the folder of a prepared TFDS dataset: it has no dataset_info.json and no shards (.parquet, "
        ".arrow or .tar); of JSON files name one"
    )


def test_a_bad_file_of_a_mixture_is_named(load):
    with pytest.raises(UserError, match="bad.json' is not valid JSON: Expecting property name"):
        load({"good": [text_row(0)], "bad": b"[{"})
