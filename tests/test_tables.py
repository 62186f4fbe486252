"""Parquet and Arrow files: which columns are what, large row groups, compressed, cut and damaged files."""

import datetime
import decimal
import json
import pickle
import re
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import formats
from sparsecut_jax.data import tables
from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.data.opening import open_rows
from sparsecut_jax.data.tables import TableRows
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.types import BadSample, UserError

PAIR = formats.PAIR


@pytest.fixture
def opened(tmp_path):
    """Function that writes columns to a Parquet file and opens it."""

    def write(columns, metadata=None, **settings):
        table = pa.table(columns)
        table = table.replace_schema_metadata(metadata) if metadata else table
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
        return open_rows(SourceConfig(path=str(tmp_path / "x.parquet"), **settings))

    return write


@pytest.fixture
def refused(opened, tmp_path):
    def sentence(columns, **settings) -> str:
        with pytest.raises(UserError) as caught:
            opened(columns, **settings)
        return str(caught.value).replace(repr(str(tmp_path / "x.parquet")), "FILE")

    return sentence


def asked(question: str, answer: str) -> list:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


CELL = {"bytes": b"PNG", "path": "a.png"}


@pytest.mark.parametrize(
    ("columns", "settings", "expected"),
    [
        ({"question": ["q"], "answer": ["a"]}, {}, {"conversations": asked("q", "a")}),
        (
            {"image": pa.array([CELL], PAIR), "caption": ["a cat"], "id": [7]},
            {},
            {"id": 7, "image": b"PNG", "conversations": asked("<image>", "a cat")},
        ),
        (
            {"image": pa.array([{"bytes": None, "path": "a.png"}], PAIR), "question": ["q"], "answers": [["a", "b"]]},
            {},
            {"image": "a.png", "answers": ["a", "b"], "conversations": asked("<image>\nq", "a")},
        ),
        (
            {"images": pa.array([[CELL, CELL]], pa.list_(PAIR)), "texts": [[{"user": "q", "assistant": "a"}] * 2]},
            {},
            {"images": [b"PNG"] * 2, "conversations": asked("<image><image>\nq", "a") + asked("q", "a")},
        ),
        (
            {"picture": pa.array([CELL], PAIR), "text": ["t"]},
            {},
            {"image": b"PNG", "conversations": asked("<image>", "t")},
        ),
        (
            {"image": pa.array([None], PAIR), "question": ["q"], "answer": ["a"]},
            {},
            {"conversations": asked("q", "a")},
        ),
        (
            {"jpg": [b"PNG"], "q": ["q <image>?"], "a": [[3, 4]], "conversations": [asked("no", "no")]},
            {"image": "jpg", "question": "q", "answer": "a"},
            {"conversations": asked("q <image>?", "3"), "image": b"PNG"},
        ),
        (
            {"image": ["a.png"], "label": [2.5]},
            {"question": "How much?", "answer": "label"},
            {"image": "a.png", "conversations": asked("<image>\nHow much?", "2.5")},
        ),
        (
            {"image": ["a.png"], "question": ["q"], "answer": ["a"]},
            {"image": ""},
            {"conversations": asked("q", "a")},
        ),
        (
            {"conversations": [json.dumps(asked("q", "a"))], "mask": [b"\0"], "day": [datetime.date(2026, 1, 2)]},
            {},
            {"conversations": asked("q", "a")},
        ),
        (
            {"conversations": [{"from": ["human", "gpt"], "value": ["q", "a"]}], "n": [decimal.Decimal("1.5")]},
            {},
            {"conversations": asked("q", "a")},
        ),
        (
            {"messages": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]},
            {},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ),
        (
            {"question": ["q"], "answers": [[{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}]]},
            {},
            {"answers": ["a", "b"], "conversations": asked("q", "a")},
        ),
    ],
)
def test_columns(opened, columns, settings, expected):
    rows = opened(columns, **settings)
    assert len(rows) == 1 and rows[0] == expected


def test_labels_are_named(opened):
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"image": pa.array([CELL] * 3, PAIR), "label": [1, 0, -1]}
    rows = opened(columns, metadata, answer="label", question="What is it?")
    assert [rows[i]["conversations"][1]["value"] for i in range(2)] == ["dog", "cat"]
    with pytest.raises(BadSample, match="column 'label' has no label -1"):
        rows[2]


@pytest.mark.parametrize(
    ("columns", "settings", "expected"),
    [
        (
            {"a": [1], "b": ["x"]},
            {},
            "data source FILE: expected a column conversations, messages, or question and answer, or caption; got a, b; "
            "name others as question=... and answer=... in config.data.mix",
        ),
        (
            {"question": ["q"], "answer": ["a"]},
            {"answer": "anwser"},
            "data source FILE: no column answer='anwser'; did you mean 'answer'?; the columns are question, answer",
        ),
        ({"caption": ["q"]}, {"image": "img"}, "data source FILE: no column image='img'; the columns are caption"),
        (
            {"caption": ["q"]},
            {"question": "ask"},
            "data source FILE: no column question='ask'; the columns are caption",
        ),
        (
            {"caption": ["q"]},
            {},
            "data source FILE: an answer 'caption', but neither a question nor an image; got caption",
        ),
        (
            {"x": pa.array([CELL], PAIR), "y": pa.array([CELL], PAIR), "caption": ["c"]},
            {},
            "data source FILE: several columns hold images: x, y; name one as image=...",
        ),
        ({"conversations": pa.array([], formats.TURNS)}, {}, "data source FILE has no rows; expected at least one"),
        ({"question": ["q"], "answer": [b"a"]}, {}, "data source FILE: column 'answer' is binary; expected strings"),
    ],
)
def test_refused_columns(refused, columns, settings, expected):
    assert refused(columns, **settings) == expected


@pytest.mark.parametrize(
    ("columns", "cause", "expected"),
    [
        ({"question": ["q"], "answer": [[]]}, "no_answer", "column 'answer' is empty"),
        ({"question": [None], "answer": ["a"]}, "format", "column 'question' is empty"),
        (
            {"question": ["q"], "answer": [{"x": 1}]},
            "format",
            "column 'answer' is a dict, expected a string or a number",
        ),
        ({"conversations": ["[{"]}, "text", "column 'conversations' is a string, but not valid JSON: "),
        ({"texts": [[{"user": "q", "assistant": None}]]}, "format", "pair 0 of column 'texts' must have the strings"),
    ],
)
def test_bad_row(opened, columns, cause, expected):
    rows = opened(columns)
    with pytest.raises(BadSample) as caught:
        rows[0]
    assert caught.value.cause == cause and str(caught.value).startswith(expected)


def test_image_or_images_whichever_is_not_null(opened):
    rows = opened({
        "image": pa.array([CELL, None, None, CELL], PAIR), "images": pa.array([None, [CELL, None], [], [CELL]], pa.list_(PAIR)),
        "question": ["q"] * 4, "answer": ["a"] * 4,
    })  # fmt: skip
    assert rows[0] == {"image": b"PNG", "conversations": asked("<image>\nq", "a")}
    assert rows[1] == {"images": [b"PNG"], "conversations": asked("<image>\nq", "a")}
    assert rows[2] == {"images": [], "conversations": asked("q", "a")}
    with pytest.raises(BadSample, match="both columns 'image' and 'images' are present; expected only one"):
        rows[3]


def test_pictures_inside_the_turns(opened):
    """As `datasets` writes content parts: every part has all keys, most of them null."""
    part = pa.struct({"type": pa.string(), "text": pa.string(), "image": PAIR})
    turn = pa.struct({"role": pa.string(), "content": pa.list_(part), "loss": pa.bool_()})
    asks = [{"type": "image", "text": None, "image": CELL}, {"type": "text", "text": "q", "image": None}]
    says = [{"type": "text", "text": "a", "image": {"bytes": None, "path": None}}]
    turns = [{"role": "user", "content": asks, "loss": None}, {"role": "assistant", "content": says, "loss": True}]
    (row,) = opened({"messages": pa.array([turns], pa.list_(turn)), "thumbnail": [b"not read"]})
    assert canonical(row, "r", 1) == {"images": [b"PNG"], "conversations": asked("<image>q", "a")}


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=["large", "view", "dictionary"],
)
def test_other_types_of_texts(opened, kind):
    times = pa.array([1], pa.timestamp("ns", tz="Europe/Berlin"))  # pandas writes these, and Python has none
    columns = {"a.b": [7], "when": times, "q.q": pa.array(["q"], pa.string()).cast(kind), "answer": ["a"]}
    pictures = pa.array([[b"P", b"Q"]], pa.large_list(pa.large_binary()))
    expected = {"a.b": 7, "images": [b"P", b"Q"], "conversations": asked("<image><image>\nq", "a")}
    assert opened(columns | {"images": pictures}, question="q.q")[0] == expected


def test_null_columns_are_absent(opened):
    columns = {
        "id": ["x"], "image": pa.array([None], pa.null()), "system": pa.array([None], pa.string()),
        "conversations": pa.array([[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]], formats.TURNS),
    }  # fmt: skip
    row = canonical(opened(columns)[0], "x", 1)
    assert row["conversations"] == asked("q", "a") and "system" not in row


def many(count: int) -> pa.Table:
    cells = [{"bytes": bytes([i % 251]) * 1000, "path": None} for i in range(count)]
    columns = {"image": pa.array(cells, PAIR), "caption": [f"row {i}" for i in range(count)]}
    return pa.table(columns | {"mask": [b"\0" * 100] * count})


def check_many(rows: TableRows, count: int) -> None:
    assert len(rows) == count
    for i in np.random.default_rng(0).permutation(count)[:200].tolist():
        assert rows[i] == {"image": bytes([i % 251]) * 1000, "conversations": asked("<image>", f"row {i}")}


@pytest.mark.parametrize("rows_of_a_group", [1, 7, 500])
@pytest.mark.parametrize("large", [1 << 25, 4000])
def test_row_groups(tmp_path, monkeypatch, rows_of_a_group, large):
    """Small ones are read where they are, a file with a large one is written out as Arrow without other columns."""
    monkeypatch.setattr(tables, "LARGE", large)
    pq.write_table(many(500), tmp_path / "x.parquet", row_group_size=rows_of_a_group)
    rows = open_rows(SourceConfig(path=str(tmp_path / "x.parquet")))
    assert rows.files[0].kind == ("arrow file" if large == 4000 and rows_of_a_group > 3 else "parquet")
    check_many(rows, 500)
    check_many(pickle.loads(pickle.dumps(rows)), 500)


@pytest.mark.parametrize("kind", ["arrow", "stream"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_compressed_arrow_is_written_out(tmp_path, kind, compression):
    write = {"arrow": formats.write_arrow, "stream": formats.write_stream}[kind]
    write(many(500), tmp_path / "x", rows=50, options=pa.ipc.IpcWriteOptions(compression=compression))
    rows = open_rows(SourceConfig(path=str(tmp_path / "x")))
    assert (rows.files[0].local == str(tmp_path / "x")) == (compression is None)
    check_many(rows, 500)


def test_fingerprint_is_the_files_and_not_the_copys(tmp_path, monkeypatch):
    pq.write_table(many(50), tmp_path / "x.parquet")
    first = open_rows(SourceConfig(path=str(tmp_path / "x.parquet"))).fingerprint()
    monkeypatch.setattr(tables, "LARGE", 10)
    assert open_rows(SourceConfig(path=str(tmp_path / "x.parquet"))).fingerprint() == first
    assert open_rows(SourceConfig(path=str(tmp_path / "x.parquet"), question="Which?")).fingerprint() != first


def test_shards_of_other_columns_and_of_no_rows(tmp_path):
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), tmp_path / "b.parquet"
    )
    pq.write_table(pa.table({"image": [b"PNG"], "caption": ["c"], "id": [1]}), tmp_path / "c.parquet")
    rows = open_rows(SourceConfig(path=str(tmp_path)))
    assert list(rows) == [
        {"conversations": asked("q", "a")},
        {"id": 1, "image": b"PNG", "conversations": asked("<image>", "c")},
    ]
    assert [rows.place(i) for i in (0, 1, -1)] == ["row 0 of a.parquet", "row 0 of c.parquet", "row 0 of c.parquet"]
    pq.write_table(pa.table({"x": [1]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="d.parquet': expected a column conversations, messages, or"):
        open_rows(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_a_cut_file_is_never_taken_for_a_whole_one(tmp_path, kind):
    path = tmp_path / "x"
    write = {"parquet": pq.write_table, "arrow": formats.write_arrow, "stream": formats.write_stream}[kind]
    write(many(20), path)
    whole = path.read_bytes()
    for end in sorted({*range(1, len(whole), 997), len(whole) - 1, len(whole) - 8, len(whole) - 9}):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError) as caught:
            open_rows(SourceConfig(path=str(path)))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_damage_ends_in_a_sentence_and_not_in_a_crash(tmp_path, kind):
    write = {"parquet": pq.write_table, "arrow": formats.write_arrow, "stream": formats.write_stream}[kind]
    write(many(20), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    refused = bad = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        content = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            content[at] = rng.integers(256)
        if seed % 2:  # in what describes the data
            content[int(rng.integers(len(whole) - 400, len(whole)))] ^= 255
            content[int(rng.integers(0, 900))] ^= 255
        path = tmp_path / f"{seed}"
        path.write_bytes(content)
        try:
            rows = open_rows(SourceConfig(path=str(path)))
        except UserError:
            refused += 1
            continue
        for i in range(len(rows)):
            try:
                rows[i]
            except BadSample:
                bad += 1
    assert refused


def test_a_file_that_changes_is_named(tmp_path):
    path = str(tmp_path / "x.parquet")
    pq.write_table(many(5), path)
    sent = pickle.dumps(open_rows(SourceConfig(path=path)))
    tables._open.cache_clear(), tables._row_group.cache_clear()
    pq.write_table(many(6), path)
    with pytest.raises(UserError, match=re.escape(f"data source {path!r} has changed since this run opened it")):
        pickle.loads(sent)[0]


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 10)
    pq.write_table(many(5), tmp_path / "x.parquet")
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=9))
    check_many(open_rows(SourceConfig(path=str(tmp_path / "x.parquet"))), 5)  # by row group, slowly
    monkeypatch.setattr(tables, "HUGE", 10)
    with pytest.raises(UserError, match="is unpacked once for random access to its rows, but does not fit into"):
        open_rows(SourceConfig(path=str(tmp_path / "x.parquet")))
