"""Rows of JSON and JSONL files by number: what `rows[i]` gives, and which files are refused as a whole."""

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from sparsecut_jax.data import rows as rows_lib
from sparsecut_jax.data import unpacked as unpacked_lib
from sparsecut_jax.data.rows import JsonRows, Subset, is_folder
from sparsecut_jax.data.scratch import MappedArray
from sparsecut_jax.types import BadSample, UserError

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def opened(tmp_path):
    """Function that writes bytes, or JSON values, to a file and opens it."""

    def write_and_open(content) -> JsonRows:
        path = tmp_path / "mine.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return JsonRows(str(path))

    return write_and_open


@pytest.fixture
def refused(opened, tmp_path):
    """Function: the sentence a file is refused with, with FILE for its path."""

    def sentence(content: bytes) -> str:
        with pytest.raises(UserError) as caught:
            opened(content)
        assert not isinstance(caught.value, BadSample)
        return str(caught.value).replace(str(tmp_path / "mine.json"), "FILE")

    return sentence


def read(rows: JsonRows) -> list:
    """All rows; in the place of a bad one its cause and the beginning of its sentence."""
    found = []
    for i in range(len(rows)):
        try:
            found.append(rows[i])
        except BadSample as error:
            found.append((error.cause, str(error).partition(":")[0]))
    return found


NO_JSON = ("text", "it is not valid JSON")
NO_UTF8 = ("text", "it is not UTF-8")


# ----------------------------------------------------------------------------------------------------------------------
# good files

VALUES = [
    {"id": 1},
    {},
    {"text": "Grüße, 日本語 😀"},
    {"text": 'brackets ]}[{ in "a string", a \\ at its end\\'},
    {"text": "\\", '"]': '\\"', "": "line\nend\ttab\u2028\x7f\x00"},
    {"lists": [[], [[1, [2]]], {"a": [{"b": {}}]}], "numbers": [1e-3, -0, 1.5], "none": None, "yes": True},
]


@pytest.mark.parametrize(
    "write",
    [
        lambda text: json.dumps(text).encode(),
        lambda text: json.dumps(text, ensure_ascii=False).encode(),
        lambda text: json.dumps(text, indent=4).encode(),
        lambda text: json.dumps(text, separators=(",", ":")).encode(),
        lambda text: BOM + json.dumps(text).encode(),
        lambda text: b" \t\r\n" * 2000 + json.dumps(text, indent=1).replace("\n", "\r\n").encode() + b"\r\n\t ",
        lambda text: "\n".join(map(json.dumps, text)).encode(),
        lambda text: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in text).encode(),
        lambda text: BOM + "\r\n".join(map(json.dumps, text)).encode(),
        lambda text: b"\n" * 5000 + "\n\n \r\n      \n".join(map(json.dumps, text)).encode() + b"\n\n\t\t\t\t\t\n   ",
        lambda text: "".join("    " + json.dumps(row) + "    \n" for row in text).encode(),
    ],
    ids=[
        "list", "unicode", "indented", "compact", "mark", "white list",
        "lines", "unicode lines", "dos lines", "blank lines", "white lines",
    ],
)  # fmt: skip
def test_good_file(opened, write):
    rows = opened(write(VALUES))
    assert len(rows) == 6
    assert list(rows) == [rows[i] for i in range(6)] == VALUES
    assert rows[-1] == VALUES[-1]
    with pytest.raises(IndexError):
        rows[6]


def test_one_line_is_a_file_of_lines(opened):
    assert list(opened(b'{"id": 1}')) == [{"id": 1}]


def test_100_levels_are_no_trouble(opened):
    deep = {"a": 1}
    for _ in range(100):
        deep = {"a": [deep]}
    assert list(opened([deep, {"id": 2}])) == [deep, {"id": 2}]


def draw(rng: random.Random, depth: int):
    """A JSON value with much in it that looks like structure."""
    kind = rng.choice("sssnlo" if depth else "sssn")
    if kind == "s":
        return "".join(rng.choice('"\\[]{},:\n\t ab é日😀\u2028\x00\ud800') for _ in range(rng.randrange(8)))
    if kind == "n":
        return rng.choice([0, -1, 3.25, 1e30, True, False, None, 10**20])
    count = rng.randrange(4)
    if kind == "l":
        return [draw(rng, depth - 1) for _ in range(count)]
    return {draw(rng, 0) if rng.random() < 0.5 else str(i): draw(rng, depth - 1) for i in range(count)}


@pytest.mark.parametrize("block", range(4))
def test_places_are_those_that_json_finds(opened, block):
    for seed in range(100 * block, 100 * block + 100):
        rng = random.Random(seed)
        values = [{"row": draw(rng, 4)} for _ in range(rng.randrange(1, 6))]
        ascii = rng.random() < 0.5
        values = json.loads(json.dumps(values))  # keys that are no texts
        if not ascii:
            values = json.loads(json.dumps(values).replace("\\ud800", ""))
        indent = rng.choice([None, 0, 3])
        separators = rng.choice([(",", ":"), (" , ", " :\n"), (",\r\n", ": ")])
        content = json.dumps(values, ensure_ascii=ascii, indent=indent, separators=separators).encode()
        assert list(opened(content)) == json.loads(content) == values, seed
        lines = "\n".join(json.dumps(value, ensure_ascii=ascii) for value in values).encode()
        assert list(opened(lines)) == values, seed


def test_a_cut_file_is_never_taken_for_a_whole_one(refused):
    """Wherever a copy of a list has stopped: in a string, in an escape, between rows."""
    whole = json.dumps(VALUES).encode()
    for end in range(1, len(whole)):
        assert refused(whole[:end]).startswith("data source 'FILE' is not valid JSON: "), whole[:end]


# ----------------------------------------------------------------------------------------------------------------------
# files that are refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "data source 'FILE' is an empty file; expected at least one row"),
        (b" \n\n ", "data source 'FILE' contains only white space; expected at least one row"),
        (b" " * 70_000, "data source 'FILE' is not valid JSON: Expecting value: line 1 column 70001 (char 70000)"),
        (BOM, "data source 'FILE' contains only white space; expected at least one row"),
        (b"[]", "data source 'FILE' is an empty list; expected at least one row"),
        (b" " * 5000 + b"[\n]\n", "data source 'FILE' is an empty list; expected at least one row"),
        (b"[1, 2]", "FILE row 0: expected an object, got int"),
        (b'["a", "b"]', "FILE row 0: expected an object, got str"),
        (b'[{"a": 1}, null]', "FILE row 1: expected an object, got NoneType"),
        (b'[{"a": 1}, {"a": 2}', "data source 'FILE' is not valid JSON: Expecting ',' delimiter: line 1 column 20"),
        (b'[{"a": 1}] {"a": 2}', "data source 'FILE' is not valid JSON: Extra data: line 1 column 12 (char 11)"),
        (b'[{"a": 1}]]', "data source 'FILE' is not valid JSON: Extra data: line 1 column 11 (char 10)"),
        (b'[{"a": 1}]\n[{"a": 2}]', "data source 'FILE' is not valid JSON: Extra data: line 2 column 1 (char 11)"),
        (b'[{"a": 1},, {"a": 2}]', "data source 'FILE' is not valid JSON: Expecting value: line 1 column 11 (char 10)"),
        (b'[{"a": 1}, ]', "data source 'FILE' is not valid JSON: "),
        (b'[, {"a": 1}]', "data source 'FILE' is not valid JSON: Expecting value: line 1 column 2 (char 1)"),
        (b'[{"a": 1} {"a": 2}]', "data source 'FILE' is not valid JSON: Expecting ',' delimiter: line 1 column 11"),
        (b'[{"a": "x}, {"a": "y"}]', "data source 'FILE' is not valid JSON: Expecting ',' delimiter: line 1 column 15"),
        (b'{"a": 1,\n "b": 2}\n', "data source 'FILE': expected a list of rows, got dict"),
        (b" " * 5000 + b'{\n"a": 1}', "data source 'FILE': expected a list of rows, got dict"),
        (b'{"a": nope}\n{"a": 2}', "data source 'FILE' is not valid JSON: Expecting value: line 1 column 7 (char 6)"),
        (b"null", "data source 'FILE' holds one JSON NoneType; expected a list of rows"),
        (b"NaN", "data source 'FILE' holds one JSON float; expected a list of rows"),
        (b'"text"', "data source 'FILE' holds one JSON str; expected a list of rows"),
        (b'["\xe9"]', "data source 'FILE' is not valid JSON: 'utf-8' codec can't decode byte 0xe9 in position 2"),
        (BOM + BOM + b'[{"a": 1}]', "data source 'FILE' is text but not JSON; it begins with '\\ufeff[{"),
        (b"[" * 100_000, "data source 'FILE' is not valid JSON: "),
        (b'[{"a": ' * 100_000, "data source 'FILE' is not valid JSON: "),
        (b"[" + b"9" * 5000 + b"]", "data source 'FILE' is not valid JSON: "),
    ],
)
def test_refused_file(refused, content, expected):
    assert refused(content).startswith(expected)


def test_binary_junk_ends_in_a_sentence(opened):
    for seed in range(80):
        rng = np.random.default_rng(seed)
        junk = rng.integers(0, 256, 300, np.uint8).tobytes() + bytes(rng.choice(list(b'[]{}",\\: \n'), 50))
        for start in (b"", b"[", b"[{", b'{"a": 1}\n', b'[{"a": "'):
            with contextlib.suppress(UserError):
                read(opened(start + junk))


def test_a_text_without_an_end_takes_no_time(refused):
    began = time.monotonic()
    assert refused(b'[{"a": "' + b'\\"' * 20_000).startswith(
        "data source 'FILE' is not valid JSON: Unterminated string"
    )
    assert time.monotonic() - began < 2


def test_missing_file(tmp_path):
    with pytest.raises(UserError) as caught:
        JsonRows(str(tmp_path / "no.json"))
    assert str(caught.value) == f"data source {str(tmp_path / 'no.json')!r} cannot be read: No such file or directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(opened, tmp_path):
    opened([{"id": 1}])
    (tmp_path / "mine.json").chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied$"):
        JsonRows(str(tmp_path / "mine.json"))


def test_a_failing_disk(opened, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rows_lib, "unpacked", fail)
    with pytest.raises(UserError, match="cannot be read: Input/output error$"):
        opened([{"id": 1}])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as caught:
        JsonRows(str(tmp_path / "pipe"))
    assert str(caught.value) == f"data source {str(tmp_path / 'pipe')!r} cannot be read: it is not a regular file"


# ----------------------------------------------------------------------------------------------------------------------
# bad rows in good files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"a": 1}, {"a": nope}, {"a": 3}]', [{"a": 1}, NO_JSON, {"a": 3}]),
        (b'[{"a": 1}, {"a": 1, }]', [{"a": 1}, NO_JSON]),
        (b'[{"a": 1}, {"a": "\n"}]', [{"a": 1}, NO_JSON]),
        (b'[{"a": 1}, {"a": "\xe9"}, {"a": 3}]', [{"a": 1}, NO_UTF8, {"a": 3}]),
        (b'[{"a": "\xff[{"}, {"a": 2}]', [NO_UTF8, {"a": 2}]),
        (b'[{"a": ' + b"9" * 5000 + b'}, {"a": 2}]', [NO_JSON, {"a": 2}]),
        (b'[{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b'}, {"a": 2}]', [NO_JSON, {"a": 2}]),
        (b'[[1], {"a": 2}]', [[1], {"a": 2}]),  # a row, though none that `canonical` takes
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', [{"a": 1}, NO_JSON, {"a": 3}]),
        (b'{"a": 1}\n{"a": 2} {"a": 2}\n{"a": 3}\n', [{"a": 1}, NO_JSON, {"a": 3}]),
        (b'{"a": 1}\n{"a": "\xe9"}\n{"a": 3}\n', [{"a": 1}, NO_UTF8, {"a": 3}]),
        (b'{"a": "\xe9"}\n{"a": 2}\n', [NO_UTF8, {"a": 2}]),
        (b'{"a": 1}\nnull\n7\n[]\n', [{"a": 1}, None, 7, []]),
        (b'{"a": 1}\n' + BOM + b'{"a": 2}\n', [{"a": 1}, NO_JSON]),
        (b'{"a": 1}\n\x00\x00\x00\x00\n{"a": 3}', [{"a": 1}, NO_JSON, {"a": 3}]),
        (b'{"a": 1}\n{"a": 2', [{"a": 1}, NO_JSON]),  # a cut copy
    ],
)
def test_bad_row(opened, content, expected):
    assert read(opened(content)) == expected


def test_sentences_of_bad_rows(opened):
    rows = opened(b'{"a": 1}\n{"a": "\xe9"}\n{"a": nope}\n')
    with pytest.raises(BadSample) as caught:
        rows[1]
    assert str(caught.value) == "it is not UTF-8: byte 16 of the file"
    with pytest.raises(BadSample) as caught:
        rows[2]
    assert str(caught.value) == "it is not valid JSON: Expecting value: line 1 column 7 (char 6)"


# ----------------------------------------------------------------------------------------------------------------------
# other processes


def test_what_goes_to_other_processes_is_small_and_works_there(opened):
    rows = opened([{"id": i, "text": "x" * 100} for i in range(5000)])
    subset = Subset(rows, np.arange(4999, 0, -2))
    array = MappedArray(np.arange(100_000))
    assert (rows[3]["id"], subset[0]["id"], array.values[7]) == (3, 4999, 7)  # opened here
    for value in (rows, subset, array):
        assert len(pickle.dumps(value)) < 2000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(rows.__getitem__, [0, 4999]) == [rows[0], rows[4999]]
        assert pool.apply(list, (subset,)) == list(subset)
        assert pool.apply(getattr, (array, "values")).tolist() == list(range(100_000))


def test_subset(opened):
    rows = opened([{"id": i} for i in range(10)])
    subset = Subset(rows, [7, 2, 2])
    assert (len(subset), list(subset), subset[-1]) == (3, [{"id": 7}, {"id": 2}, {"id": 2}], {"id": 2})
    assert list(pickle.loads(pickle.dumps(Subset(subset, np.array([2, 0]))))) == [{"id": 2}, {"id": 7}]
    with pytest.raises(IndexError):
        subset[3]
    assert list(Subset(rows, np.array([], int))) == []


@pytest.mark.parametrize("values", [np.zeros(0, np.int64), np.zeros((0, 2)), np.arange(6).reshape(3, 2)])
def test_mapped_array(values):
    found = pickle.loads(pickle.dumps(MappedArray(values))).values
    np.testing.assert_array_equal(found, values)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)


def test_files_of_a_process_go_with_it():
    code = (
        "import numpy as np; from sparsecut_jax.data.scratch import MappedArray; print(MappedArray(np.arange(3)).path)"
    )
    path = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert path.endswith(".npy") and not os.path.exists(os.path.dirname(path))


# ----------------------------------------------------------------------------------------------------------------------
# what a file is


def test_fingerprint(opened):
    first = opened([{"id": 1}, {"id": 2}]).fingerprint()
    assert first == "2 rows, sha256 ebbba0e3c8e1580a"
    assert opened([{"id": 1}, {"id": 2}]).fingerprint() == first
    assert opened([{"id": 1}, {"id": 3}]).fingerprint() != first


class Bucket:
    """Stands in for epath where a path is gs://...: "gs://bucket/NAME" is a file of a folder here."""

    def __init__(self, folder):
        self.folder, self.reads = folder, 0

    def Path(self, path):
        assert path.startswith("gs://bucket/")
        self.reads += 1
        return self.folder / path.removeprefix("gs://bucket/")


def test_file_in_a_bucket(tmp_path, monkeypatch):
    for module in (rows_lib, unpacked_lib):
        monkeypatch.setattr(module, "epath", Bucket(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    rows = JsonRows("gs://bucket/a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"id": 3}\n')
    again = JsonRows("gs://bucket/a.jsonl")
    assert (list(rows), list(again)) == ([{"id": 1}, {"id": 2}], [{"id": 3}])
    assert rows.path == "gs://bucket/a.jsonl" and list(pickle.loads(pickle.dumps(rows))) == list(rows)
    with pytest.raises(UserError, match="^data source 'gs://bucket/b.json' cannot be read: No such file or directory$"):
        JsonRows("gs://bucket/b.json")
    assert [is_folder(f"gs://bucket/{name}") for name in ("", "a.jsonl")] == [True, False]


def test_is_folder(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    assert is_folder(str(tmp_path)) and not is_folder(str(tmp_path / "a.json"))
    for path in ("", "a\0.json", str(tmp_path / "no.json"), str(tmp_path / "a.json" / "b.json")):
        with pytest.raises(UserError) as caught:
            is_folder(path)
        assert str(caught.value) == (
            f"data source {path!r} does not exist; expected 'easy_vqa', 'scenes', 'tfds:NAME', the folder of a dataset "
            "or of shards, or a JSON, JSONL, Parquet, Arrow or tar file"
        )


@pytest.mark.parametrize("path", ["http://host/a.json", "a" * 5000])
def test_a_path_that_cannot_be_asked_for(path):
    with pytest.raises(UserError, match=f"^data source '{path}' "):
        is_folder(path)


def test_a_file_that_changes_is_not_read_at_the_old_places(opened, tmp_path):
    """Worker processes open it later than the process that found its rows."""
    rows = opened(b'[{"a": 1}, {"a": 2}]')
    sent = pickle.dumps(rows)
    with open(rows.path, "wb") as file:
        file.write(b'[{"aaaaaaa": 1}, {"a": 2}]')
    with pytest.raises(UserError, match=" has changed since this run opened it; start again"):
        pickle.loads(sent)[0]


def test_a_list_ends_with_its_own_bracket(refused):
    assert "is not valid JSON" in refused(b'[{"a": 1}}')
