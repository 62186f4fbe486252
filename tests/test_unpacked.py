"""Compressed files and other encodings become plain files once, and cut or damaged ones a sentence."""

import bz2
import functools
import gzip
import json
import os
import struct

import pyarrow as pa
import pytest

from sparsecut_jax.data import unpacked as unpacked_lib
from sparsecut_jax.data.rows import JsonRows
from sparsecut_jax.data.unpacked import unpacked
from sparsecut_jax.types import BadSample, UserError

ROWS = [{"id": i, "text": "Gr\u00fc\u00dfe \u65e5 \U0001f600"} for i in range(300)]
LIST = json.dumps(ROWS, ensure_ascii=False).encode()
gz = functools.partial(gzip.compress, mtime=0)  # the same bytes, and so the same names of tests, in all processes
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def codec(name: str, content: bytes) -> bytes:
    return pa.Codec(name).compress(content).to_pybytes()


PACKED = {
    "gzip": gz(LINES),
    "gzip members": gz(LINES[:999]) + gz(b"") + gz(LINES[999:]),  # as pigz and cat
    "zstd": codec("zstd", LINES),
    "zstd frames": codec("zstd", LINES[:999]) + codec("zstd", LINES[999:]),
    "zstd seekable": struct.pack("<II", 0x184D2A50, 4) + b"abcd" + codec("zstd", LINES),
    "bz2": bz2.compress(LINES),
    "lz4": codec("lz4", LINES),
    "list": gz(LIST),
    "twice": gz(codec("zstd", LIST)),
    "utf-16": LIST.decode().encode("utf-16"),
    "utf-16-le without a mark": LINES.decode().encode("utf-16-le"),
    "utf-16-be": b"\xfe\xff" + LINES.decode().encode("utf-16-be"),
    "utf-16 in gzip": gz(LINES.decode().encode("utf-16")),
    "utf-32": LINES.decode().encode("utf-32"),
    "mark": b"\xef\xbb\xbf" + LIST,
}


@pytest.mark.parametrize("name", PACKED)
def test_rows_are_those_of_the_plain_file(tmp_path, name):
    path = tmp_path / "rows"
    path.write_bytes(PACKED[name])
    rows = JsonRows(str(path))
    assert list(rows) == ROWS and rows.path == str(path)


def test_fingerprint_is_that_of_the_content(tmp_path):
    prints = set()
    for name, content in {"a.jsonl": LINES, "b.gz": PACKED["gzip"], "c.zst": PACKED["zstd"]}.items():
        (tmp_path / name).write_bytes(content)
        prints.add(JsonRows(str(tmp_path / name)).fingerprint())
    assert len(prints) == 1


def test_only_the_last_layer_stays(tmp_path):
    (tmp_path / "x").write_bytes(PACKED["twice"])
    before = set(os.listdir(unpacked_lib.scratch()))
    local, kind = unpacked(str(tmp_path / "x"))
    assert kind == "json" and set(os.listdir(unpacked_lib.scratch())) - before == {os.path.basename(local)}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (PACKED["gzip"][:-20], "cannot be read: it is truncated after "),
        (PACKED["gzip"][:12], "cannot be read: it is truncated after 0 bytes of content (gzip); download or write it again"),
        (PACKED["gzip"][:-6] + b"\0" + PACKED["gzip"][-5:], "cannot be read: zlib inflate failed: incorrect data check after"),
        (PACKED["zstd"][:-3], "cannot be read: it is truncated after "),
        (PACKED["zstd"] + b"junk", "cannot be read: "),
        (PACKED["bz2"][:-3], "cannot be read: it is truncated after "),
        (PACKED["lz4"][:-9], "cannot be read: it is truncated after "),
        (PACKED["utf-16"][:-1], "cannot be read: it begins as UTF-16, but is not valid from byte "),
        (gz(b""), "is an empty file; expected at least one row"),
        (gz(b"<html>"), "is a web page, not the data"),
        (gz(b"[]"), "is an empty list; expected at least one row"),
        (gz(b'[{"a": 1}'), "is not valid JSON: Expecting ',' delimiter: line 1 column 10 (char 9)"),
    ],
)  # fmt: skip
def test_refused(tmp_path, content, expected):
    path = str(tmp_path / "x.json.gz")
    (tmp_path / "x.json.gz").write_bytes(content)
    with pytest.raises(UserError) as caught:
        JsonRows(path)
    assert str(caught.value).startswith(f"data source {path!r} {expected}")
    assert "\n" not in str(caught.value)


def test_packed_without_end(tmp_path):
    content = LIST
    for _ in range(6):
        content = gz(content)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="is compressed more than 4 times; decompress it$"):
        unpacked(str(tmp_path / "x"))


def test_half_a_surrogate_pair_is_one_bad_row(tmp_path):
    text = '{"a": "x"}\n{"a": "\ud83d"}\n{"a": "y"}\n'
    (tmp_path / "x").write_bytes(text.encode("utf-16", "surrogatepass"))
    rows = JsonRows(str(tmp_path / "x"))
    assert (rows[0], rows[2]) == ({"a": "x"}, {"a": "y"})
    with pytest.raises(BadSample, match="it is not UTF-8"):
        rows[1]


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(unpacked_lib, "_decompressed", full)
    (tmp_path / "x").write_bytes(PACKED["gzip"])
    with pytest.raises(
        UserError, match="does not fit into .*, which has .* GiB left; set TMPDIR to a folder with more"
    ):
        unpacked(str(tmp_path / "x"))
