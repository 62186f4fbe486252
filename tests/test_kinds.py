"""What a file is by its first bytes, and what is said of files that are not read."""

import io
import pickle
import sqlite3
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from encoded_images import encoded
from sparsecut_jax.data.kinds import kind_of
from sparsecut_jax.types import UserError

ROWS = b'[{"a": 1}]'


def packed(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table a (b)")
    return connection.serialize()


def tar(**files: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


picture = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (ROWS, "json"),
        (b"\xef\xbb\xbf\n {", "json"),
        (b" " * 100_000 + ROWS, "json"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x28\xb5\x2f\xfd\0", "zstd"),
        (b"\x5a\x2a\x4d\x18\x04\0\0\0abcd\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh9", "bz2"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (ROWS.decode().encode("utf-16"), "utf-16"),
        (b"\xfe\xff" + ROWS.decode().encode("utf-16-be"), "utf-16"),
        (ROWS.decode().encode("utf-16-le"), "utf-16-le"),
        (("\n" + ROWS.decode()).encode("utf-16-be"), "utf-16-be"),
        (ROWS.decode().encode("utf-32"), "utf-32"),
        (b"PAR1\0\0", "parquet"),
        (b"ARROW1\0\0", "arrow file"),
        (b"\xff\xff\xff\xff\x20\0\0\0", "arrow stream"),
        (tar(a=b""), "tar"),
    ],
)
def test_kind(tmp_path, content, kind):
    (tmp_path / "x").write_bytes(content)
    assert kind_of(str(tmp_path / "x"), "x") == kind


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (packed(**{"[Content_Types].xml": b"", "xl__workbook.xml": b""}), "is an Excel or Office file; save the sheet as"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Excel or Office file; save the sheet as CSV and convert it: pandas"),
        (npz(), "is a NumPy .npz file; write its rows as JSONL or Parquet"),
        (npy(), "is a NumPy .npy file; "),
        (packed(model__data=b"", **{"model__data.pkl": b""}), "is a ZIP archive; unpack it and name a file or folder inside"),
        (packed(**{"model__data.pkl": b""}), "is a PyTorch file; "),
        (packed(), "is a ZIP archive; "),
        (b"\xfd7zXZ\0", "is an xz archive; unpack it with `unxz`"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive; "),
        (database(), "is an SQLite database; convert it: pandas.read_sql(...).to_json('rows.jsonl', orient='records'"),
        (pickle.dumps([{"a": 1}]), "is a Python pickle, which is never loaded because it can run any code; write its rows"),
        (b"\x89HDF\r\n\x1a\n\0", "is an HDF5 file; "),
        (struct.pack("<Q", 60) + b'{"a": {"dtype": "F32"', "holds the weights of a model (safetensors); "),
        (encoded(picture, "PNG"), "is a picture; config.data.source is the file of the rows, config.data.images the folder"),
        *((encoded(picture, kind), "is a picture; ") for kind in ("JPEG", "GIF", "BMP", "TIFF", "WEBP")),
        (b"\0\0\0\x20ftypisom\0\0", "is a video, which is not supported; "),
        (b"\x1a\x45\xdf\xa3", "is a video, "),
        (b"RIFF\0\0\0\0WAVEfmt ", "is audio, which is not supported; "),
        (b"%PDF-1.7", "is a PDF file; "),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "is a Git LFS pointer, not the data; run `git lfs pull` where it was cloned",
        ),
        (b"<!DOCTYPE html><html>", "is a web page, not the data (a link to a page was downloaded); download the file itself"),
        (b"\n<html lang='en'>", "is a web page, "),
        (b"<?xml version='1.0'?><rows>", "is XML; "),
        (b"id,image,caption\n1,a.png,red\n", "is text but not JSON; it looks like CSV, beginning with 'id,image,caption'; "),
        (b"id\timage\n1\ta.png\n", "is text but not JSON; it looks like CSV, beginning with 'id\\timage'; convert it: pandas"),
        (b"hello there\n", "is text but not JSON; it begins with 'hello there'; expected JSON, JSONL (both also .gz"),
        ("Gr\u00fc\u00dfe\n".encode("latin-1") * 9, "is text but not JSON; it begins with 'Gr\ufffd\ufffde'; "),
        (b"\0" * 10_240, "begins with zeros: an empty tar, or an incomplete download; download it again"),
        (b"\x01\x02\x03\x04" * 99, "is in an unknown binary format (it begins with b'\\x01\\x02\\x03\\x04"),
        (b"", "is an empty file; expected at least one row"),
        (b"7", "holds one JSON int; expected a list of rows"),
    ],
)  # fmt: skip
def test_refused(tmp_path, content, expected):
    path = str(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        kind_of(path, path)
    assert str(caught.value).startswith(f"data source {path!r} {expected}")
    assert "\n" not in str(caught.value)


def test_a_large_wrong_file_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.write(pickle.dumps("x" * 1000))
        file.truncate(1 << 40)  # a sparse file: reading a terabyte would take hours
    with pytest.raises(UserError, match="is a Python pickle"):
        kind_of(str(path), "x")


def test_any_beginning_ends_in_a_kind_or_a_sentence(tmp_path):
    path = tmp_path / "x"
    for seed in range(300):
        rng = np.random.default_rng(seed)
        path.write_bytes(rng.integers(0, 256, rng.integers(1, 700), np.uint8).tobytes())
        try:
            assert isinstance(kind_of(str(path), "x"), str)
        except UserError as error:
            assert str(error).startswith("data source 'x' ")
