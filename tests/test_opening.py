"""One law for all formats: the same rows, numbers and batches, a fingerprint that lasts; and folders of shards."""

import itertools
import json
import os
import pickle
import re
import shutil
from multiprocessing import get_context

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import formats
import tiny
from encoded_images import encoded
from formats import NAMES
from sparsecut_jax.config import Config
from sparsecut_jax.data.build import build
from sparsecut_jax.data.opening import is_shards, open_rows
from sparsecut_jax.data.parts import Split
from sparsecut_jax.data.sources import load_source
from sparsecut_jax.settings import DataConfig, SourceConfig
from sparsecut_jax.text import tokenizer as tokenizers
from sparsecut_jax.types import BadSample
from test_pipeline import assert_equal, iterate

PICTURES = {f"{i}.png": encoded(Image.new("RGB", (6, 4), (i * 20, 99, 0)), "PNG") for i in range(7)}


def turns(question: str, answer: str, **more) -> list:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **more}]


ROWS = [
    *({"id": f"r{i}", "image": f"{i}.png", "conversations": turns("<image>\nwhat?", f"number {i}")} for i in range(6)),
    {"id": "text", "conversations": turns("Gr\u00fc\u00dfe?", "\u65e5\u672c \U0001f600", kind="said")},
    {"id": "two", "image": "6.png", "conversations": turns("<image>\nwho?", "me") + turns("sure?", "yes")},
]


def load(path: str, images: str = "", **settings):
    return load_source(Config(data=DataConfig(source=path, images=images, holdout=0, **settings)))


def read(part, i: int) -> tuple:
    """What a row comes to: its number, id, turns, and its pictures' files."""
    row = part.row(i)
    images = row.get("images", row.get("image"))
    images = images if isinstance(images, list) else [images] if images else []
    said = [
        {key: value for key, value in turn.items() if value is not None and key != "kind"}
        for turn in row["conversations"]
    ]
    return part.number(i), row["id"], said, [part.encoded(entry) for entry in images]


def expected(i: int) -> tuple:
    row = ROWS[i]
    said = [{"from": turn["from"], "value": turn["value"]} for turn in row["conversations"]]
    return i, row["id"], said, [PICTURES[row["image"]]] if "image" in row else []


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, str]:
    return formats.write_all(tmp_path_factory.mktemp("formats"), ROWS, PICTURES)


@pytest.fixture(scope="module")
def images(written) -> str:
    return os.path.join(os.path.dirname(written["list.json"]), "images")


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows(written, images, name, tmp_path):
    source = load(written[name], images)
    part = source.train[""]
    assert [read(part, i) for i in range(len(part))] == [expected(i) for i in range(8)]
    held = load_source(Config(data=DataConfig(source=written[name], images=images, holdout=3))).holdout[""]
    assert [read(held, i)[:2] for i in range(3)] == [expected(held.number(i))[:2] for i in range(3)]
    with pytest.raises(IndexError):
        part.rows[8]
    assert part.rows[-1]["id"] == "two"
    # the same again, and wherever it lies
    assert load(written[name], images).fingerprint == source.fingerprint
    copy = tmp_path / os.path.basename(name)
    (shutil.copytree if os.path.isdir(written[name]) else shutil.copy)(written[name], copy)
    assert load(str(copy), images).fingerprint == source.fingerprint
    # another process gets names of files
    sent = pickle.dumps(part)
    assert len(sent) < 6000
    assert read(pickle.loads(sent), 6) == expected(6)


def test_every_format_gives_the_same_batches(written, images):
    """Also from the middle on, as after a resume."""
    words = tokenizers.train(["what? who? number me sure? yes"], 300)

    def batches(name: str, first: int = 0) -> list:
        iterator = iterate(Split((load(written[name], images).train[""],)), words, first=first)
        found = [batch for batch, bad in itertools.islice(iterator, 4 - first) if not bad]
        iterator.close()
        return found

    expected = batches("list.json")
    assert len(expected) == 4
    for name in NAMES:
        assert_equal(batches(name), expected)
    assert_equal(batches("one.parquet", 2), expected[2:])


def test_worker_processes_read_every_format(written, images):
    parts = [
        load(written[name], images).train[""] for name in ("one.parquet", "lz4.feather", "saved", "tars", "utf16.json")
    ]
    with get_context("spawn").Pool(1) as pool:
        assert [pool.apply(read, (part, 5)) for part in parts] == [expected(5)] * len(parts)


def test_a_tar_in_any_order_has_all_its_rows(written, images):
    part = load(written["unsorted.tar"], images).train[""]
    assert sorted(read(part, i)[1] for i in range(8)) == sorted(row["id"] for row in ROWS)
    assert [read(part, i)[3] for i in range(8) if part.row(i)["id"] == "r5"] == [[PICTURES["5.png"]]]


@pytest.mark.parametrize("name", ["lines.jsonl.gz", "shards", "saved", "binary.parquet", "tars"])
def test_build_packs_every_format(written, images, name, tmp_path):
    part = load(written[name], images).train[""]
    built = build([part.row(i) for i in range(8)], part.encoded, str(tmp_path / "out"))
    assert (built.rows, built.images) == (8, 7)
    packed = load(str(tmp_path / "out")).train[""]
    assert [read(packed, i) for i in range(8)] == [expected(i) for i in range(8)]


def test_a_changed_row_is_another_fingerprint(written, tmp_path):
    rows = [*ROWS[:-1], ROWS[-1] | {"conversations": turns("<image>\nwho?", "no") + turns("sure?", "yes")}]
    changed = formats.write_all(tmp_path / "new", rows, PICTURES)
    for name in NAMES:
        assert load(changed[name]).fingerprint != load(written[name]).fingerprint, name


# ----------------------------------------------------------------------------------------------------------------------
# folders


def small(**columns) -> pa.Table:
    return pa.table(columns or {"question": ["q"], "answer": ["a"]})


def folder_of(tmp_path, *names: str) -> str:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(small(question=["q"], answer=[name]), tmp_path / name)
    return str(tmp_path)


def answers(rows) -> list[str]:
    return [row["conversations"][1]["value"] for row in rows]


def refusal(path: str, **settings) -> str:
    return tiny.refusal(open_rows, SourceConfig(path=path, **settings))


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    folder = folder_of(tmp_path, "b.parquet", "a.parquet", "c\u00e9 \u65e5.parquet", "sub/x.parquet", "_hidden.parquet")
    (tmp_path / "README.md").write_text("x")
    rows = open_rows(SourceConfig(path=folder))
    assert answers(rows) == ["a.parquet", "b.parquet", "c\u00e9 \u65e5.parquet"]
    assert [rows.place(i) for i in range(3)] == [
        "row 0 of a.parquet",
        "row 0 of b.parquet",
        "row 0 of c\u00e9 \u65e5.parquet",
    ]


def test_files_of_other_splits_are_left_out(tmp_path):
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"]
    folder = folder_of(tmp_path, *names)
    assert answers(open_rows(SourceConfig(path=folder))) == names[:2]
    assert answers(open_rows(SourceConfig(path=folder, split="test"))) == names[2:]
    assert refusal(folder, split="dev") == (
        f"data source {folder!r} has no split 'dev'; it has test, train: name a file, as in "
        f"{folder}/test-00000-of-00001.parquet, or set split=... in config.data.mix"
    )
    folder_of(tmp_path, "extra.parquet")
    assert refusal(folder) == (
        f"data source {folder!r} has files of split train, but extra.parquet belongs to no split; move it away"
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["data-00000-of-00003.parquet", "data-00002-of-00003.parquet"],
            "is incomplete: of 3 files data..., number 1 is",
        ),
        (["data-1-of-2.parquet"], "is incomplete: of 2 files data..., number 2 is missing"),
        (
            ["a.parquet", "b.parquet.incomplete"],
            "contains the unfinished download b.parquet.incomplete; finish it or delete it",
        ),
        (["a.parquet", "b.tar"], "contains a.parquet and b.tar; name one of them, or a folder with only one format"),
    ],
)
def test_a_folder_that_is_not_whole(tmp_path, names, expected):
    folder = folder_of(tmp_path, *names)
    assert refusal(folder).startswith(f"data source {folder!r} {expected}")


def test_a_shard_that_is_none_is_named(tmp_path):
    folder = folder_of(tmp_path, "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(folder).startswith(f"data source {folder + '/b.parquet'!r} is a Git LFS pointer, not the data; run")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    assert refusal(folder).startswith(
        f"data source {folder + '/b.parquet'!r} cannot be read as Parquet: Parquet magic bytes"
    )


def test_a_dataset_dict(written, tmp_path):
    folder = written["dict"]
    assert len(open_rows(SourceConfig(path=folder, split="test"))) == 1
    assert refusal(folder, split="tset") == (
        f"data source {folder!r} has no split 'tset'; did you mean 'test'?; it has train, test: name one, as in {folder}/train"
    )


def test_a_saved_dataset_that_is_not_whole(written, tmp_path):
    copy = tmp_path / "saved"
    shutil.copytree(written["saved"], copy)
    os.remove(copy / "data-00001-of-00002.arrow")
    assert refusal(str(copy)) == f"data source {str(copy)!r} is incomplete: data-00001-of-00002.arrow is missing"
    (copy / "state.json").write_text('{"_data_files": []}')
    assert refusal(str(copy)) == f"data source {str(copy)!r} has no rows; expected at least one"
    (copy / "state.json").write_text("{")
    assert refusal(str(copy)).startswith(
        f"data source {str(copy)!r}: its state.json or dataset_dict.json cannot be read: "
    )


def test_which_folders_hold_shards(written, tmp_path):
    assert is_shards(written["shards"]) and is_shards(written["saved"]) and is_shards(written["dict"])
    assert not is_shards(str(tmp_path)) and not is_shards("gs://bucket/x")
    folder_of(tmp_path, "data/x.parquet", "test/x.parquet")
    assert tiny.refusal(is_shards, str(tmp_path)) == (
        f"data source {str(tmp_path)!r} contains no shards itself; name one of its folders: {tmp_path}/data, {tmp_path}/test"
    )
    (tmp_path / "data" / "features.json").write_text("{}")
    assert not is_shards(str(tmp_path / "data"))  # a TFDS dataset, whatever else lies there


def test_question_and_answer_in_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"image": "a.png", "question": "what?", "answer": "red"}, {"image": "a.png", "caption": "a cat"}, {"id": 7}]
    path.write_text("\n".join(map(json.dumps, rows)))
    part = load(str(path), "DIR").train[""]
    assert part.row(0)["conversations"] == turns("<image>\nwhat?", "red")
    assert part.row(1)["conversations"] == turns("<image>", "a cat")
    with pytest.raises(BadSample, match=re.escape("x.jsonl row 2 (id 7): key 'conversations' must be")):
        part.row(2)


def test_a_bad_row_is_called_by_source_file_and_number(tmp_path):
    folder = folder_of(tmp_path, "a.parquet", "b.parquet")
    pq.write_table(small(question=["q", "q"], answer=["a", None]), tmp_path / "b.parquet")
    part = load(folder).train[""]
    with pytest.raises(BadSample) as caught:
        part.row(2)
    assert str(caught.value) == f"{folder} row 2, row 1 of b.parquet: column 'answer' is empty"
    assert caught.value.cause == "no_answer"


def test_a_split_of_one_file_is_refused(tmp_path):
    path = folder_of(tmp_path, "a.parquet") + "/a.parquet"
    assert refusal(path, split="test") == f"data source {path!r} is one file and has no split 'test'; leave split out"
