"""Rows and images become a TFDS dataset: whole or not at all, in order, byte for byte, and never with TensorFlow."""

import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import fsspec
import grain
import pytest
import tensorflow_datasets as tfds
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

from sparsecut_jax.data.build import build
from sparsecut_jax.data.tfds_source import open_tfds
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.types import BadSample, UserError

FILES = {
    "a.png": b"\x89PNG a",
    "b.jpg": b"\xff\xd8 ends in zeros\0\0",
    "c d/\u00e9.webp": b"",
    "e.png": b"\n" * 3000,
}


def turns(question: str, answer: str, **keys) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **keys}]


ROWS = [
    {"id": "one", "image": "a.png", "conversations": turns("<image>\nwhat?", "red", kind="color")},
    {"id": 2, "images": ["b.jpg", "a.png"], "conversations": turns("<image><image>\n\u00fc \u65e5 \U0001f600", "\0")},
    {"id": "text only", "conversations": turns("hi", "hello")},
    {"image": "c d/\u00e9.webp", "independent": True, "conversations": turns("<image>", "x"), "more": {"a": [0.1]}},
    {"id": "a list of one", "image": ["e.png"], "conversations": turns("<image>", "half a pair: \ud83d")},
    {"id": None, "image": None, "conversations": []},
    {"id": "none", "images": [], "conversations": []},
]
READ_BACK = [
    ROWS[0] | {"image": FILES["a.png"]},
    ROWS[1] | {"images": [FILES["b.jpg"], FILES["a.png"]]},
    ROWS[2],
    ROWS[3] | {"image": b""},
    ROWS[4] | {"image": [FILES["e.png"]]},
    *ROWS[5:],
]


def numbered(count: int) -> list[dict]:
    return [{"id": i, "image": "a.png", "conversations": turns("<image>", str(i))} for i in range(count)]


def opened(path):
    return open_tfds(SourceConfig(path=str(path)), max_pixels=100)


def test_every_row_comes_back_as_it_was(tmp_path):
    built = build(ROWS, FILES.__getitem__, str(tmp_path / "out"), shard_rows=3)
    assert (built.rows, built.images, built.shards, built.skipped) == (7, 5, 3, [])
    assert built.bytes > 3000 and built.seconds > 0
    rows = opened(tmp_path / "out")
    assert len(rows) == 7
    for i, row in enumerate(READ_BACK):
        assert rows[i] == row
        assert list(rows[i]) == list(row)  # the order of keys too


@pytest.mark.parametrize("several", [False, True])
def test_images_that_a_row_holds_itself(tmp_path, several):
    data = [b"\x89PNG\xff", b"\0"]
    row = {"id": 1, "conversations": turns("<image>", "x")} | ({"images": data} if several else {"image": data[0]})
    build([row], lambda entry: entry, str(tmp_path / "out"))
    assert opened(tmp_path / "out")[0] == row


def test_order_is_kept_over_shards(tmp_path):
    seen = []
    built = build(numbered(107), FILES.__getitem__, str(tmp_path / "out"), 25, progress=lambda *at: seen.append(at))
    assert built.shards == 5 and seen == [(done, 107) for done in range(1, 108)]
    rows = opened(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(107))
    assert [rows[i]["id"] for i in (106, 0, 25, 24)] == [106, 0, 25, 24]
    with pytest.raises(IndexError, match="row 107 of 107"):
        rows[107]


def test_plain_tfds_and_grain_read_it(tmp_path):
    out = str(tmp_path / "out")
    build(ROWS[:2], FILES.__getitem__, out, description="Two rows.")
    builder = tfds.builder_from_directory(out)
    assert (builder.info.description, builder.info.splits["train"].num_examples) == ("Two rows.", 2)
    example = builder.as_data_source("train")[1]
    assert (example["id"], json.loads(example["row"])) == (b"2", ROWS[1])
    assert list(example["images"]) == [FILES["b.jpg"], FILES["a.png"]]
    assert list(example["image_names"]) == [b"b.jpg", b"a.png"]
    plain, own = (grain.MapDataset.source(source) for source in (builder.as_data_source("train"), opened(out)))
    assert [row["id"] for row in plain] == [b"one", b"2"]
    assert [row["id"] for row in own] == ["one", 2]


def missing(name: str) -> bytes:
    if name == "b.jpg":
        raise BadSample("missing_image", f"image {name} does not exist")
    return FILES[name]


def test_a_broken_row_stops_the_build_and_leaves_nothing(tmp_path):
    with pytest.raises(BadSample, match=re.escape("row 1 (id 2): image b.jpg does not exist")) as raised:
        build(ROWS, missing, str(tmp_path / "out"), shard_rows=1)
    assert raised.value.cause == "missing_image"
    assert list(tmp_path.iterdir()) == []


def test_broken_rows_are_left_out_on_request(tmp_path):
    rows = [*ROWS[:3], ["no", "object"], {"id": "x", "image": 7}]
    built = build(rows, missing, str(tmp_path / "out"), skip=True)
    assert (built.rows, built.images) == (2, 1)
    assert [(row.cause, str(row)) for row in built.skipped] == [
        ("missing_image", "row 1 (id 2): image b.jpg does not exist"),
        ("format", "row 3: expected an object, got list"),
        ("format", "row 4 (id 'x'): key 'image' must be a path or a list of paths, got [7]"),
    ]
    assert [row.get("id") for row in opened(tmp_path / "out")] == ["one", "text only"]


@pytest.mark.parametrize(
    ("rows", "first"), [([], ""), (ROWS[1:2], "; the first: row 0 (id 2): image b.jpg does not exist")]
)
def test_nothing_to_write(tmp_path, rows, first):
    with pytest.raises(UserError) as caught:
        build(rows, missing, str(tmp_path / "out"), skip=True)
    assert str(caught.value) == f"no row to write: {len(rows)} of {len(rows)} were left out{first}"
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    for taken in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(UserError, match="already exists and is not empty; name a new folder or delete it"):
            build(ROWS, FILES.__getitem__, str(taken))
    with pytest.raises(UserError, match="cannot be written: .*Not a directory"):
        build(ROWS, FILES.__getitem__, str(tmp_path / "full" / "mine.txt" / "out"))
    with pytest.raises(UserError, match="shard_rows=0: expected at least 1"):
        build(ROWS, FILES.__getitem__, str(tmp_path / "out"), shard_rows=0)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert build(ROWS, FILES.__getitem__, str(tmp_path / "empty")).rows == 7


def test_any_error_leaves_nothing(tmp_path):
    def stopped(name: str) -> bytes:
        raise PermissionError(13, "Permission denied", name)

    with pytest.raises(UserError, match=r"row 0 \(id 'one'\) cannot be read: .*Permission denied: 'a.png'"):
        build(ROWS, stopped, str(tmp_path / "out"))
    with pytest.raises(KeyError):  # a bug stays one
        build(ROWS, {}.__getitem__, str(tmp_path / "out"))

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(ROWS, FILES.__getitem__, str(tmp_path / "out"), progress=interrupted)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, signal, sys
from sparsecut_jax.data.build import build
from sparsecut_jax.data.tfds_source import open_tfds
from sparsecut_jax.settings import SourceConfig

rows = [{"id": i, "image": "a", "conversations": []} for i in range(99)]
build(rows, str.encode, "whole", shard_rows=10)
print(len(list(open_tfds(SourceConfig(path="whole"), 100))), "tensorflow" in sys.modules, flush=True)
build(rows, str.encode, "killed", 10, progress=lambda done, total: done == 55 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_in_the_middle_and_without_tensorflow(tmp_path):
    root = str(Path(__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{SCRIPT}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (run.stdout, run.returncode) == ("99 False\n", -signal.SIGKILL), run.stderr
    assert (tmp_path / "whole").exists() and not (tmp_path / "killed").exists()


class Bucket(LocalFileSystem):
    """Stand-in for gcsfs: gs:// is a folder."""

    protocol = ("gs", "gcs")
    root = ""
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        return cls.root + "/" + path.removeprefix("gs://").rstrip("/") if path.startswith("gs://") else path


class Storage(http.server.BaseHTTPRequestHandler):
    """Stand-in for the bucket's server, which array_record asks by itself: ranges of the same files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        bucket, name = re.match(r"/storage/v1/b/([^/]+)/o/([^?]+)", self.path).groups()
        file = Path(Bucket.root, bucket, urllib.parse.unquote(name))
        data = file.read_bytes() if file.exists() else b""
        first, last = re.match(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "bytes=0-").groups()
        start = int(first) if first else max(0, len(data) - int(last))
        body = data[start : int(last) + 1 if first and last else None]
        self.send_response(206 if file.exists() else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Folder that gs:// paths lead to, for writing and reading."""
    monkeypatch.setattr(Bucket, "root", str(tmp_path / "cloud"))
    monkeypatch.setattr(
        backend.fsspec_backend, "_get_filesystem", lambda name: Bucket() if name == "gcs" else fsspec.filesystem(name)
    )
    (tmp_path / "cloud" / "mine").mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield tmp_path / "cloud" / "mine"
    server.shutdown()


def test_a_bucket_gets_shards_as_they_fill_and_the_metadata_last(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    def look(done: int, total: int) -> None:
        if done % 10 == 1:
            local = [path.name for path in tmp_path.glob("sparsecut_jax_build_*/*record*")]
            seen.append((len(local), sorted(path.name for path in bucket.glob("out/*"))))

    build(numbered(25), FILES.__getitem__, "gs://mine/out", shard_rows=10, progress=look)
    shards = [f"rows-train.array_record-0000{i}" for i in range(3)]
    assert seen == [(1, []), (1, shards[:1]), (1, shards[:2])]
    assert sorted(path.name for path in bucket.glob("out/*")) == [
        "dataset_info.json",
        "features.json",
        "metadata.json",
        *shards,
    ]
    assert not list(tmp_path.glob("sparsecut_jax_build_*"))
    rows = opened("gs://mine/out")  # metadata through etils, records through array_record's own client
    assert [row["id"] for row in rows] == list(range(25))
    assert rows[24]["image"] == FILES["a.png"] and rows.fingerprint().startswith("25 rows, sha256 ")
    with pytest.raises(UserError, match="gs://mine/out already exists and is not empty"):
        build(ROWS, FILES.__getitem__, "gs://mine/out")


def test_a_bucket_is_left_empty_by_a_build_that_fails(bucket):
    def stop(done: int, total: int) -> None:
        if done == 22:
            assert len(list(bucket.glob("out/*"))) == 2
            raise OSError("network gone")

    with pytest.raises(UserError, match="gs://mine/out cannot be written: network gone"):
        build(numbered(25), FILES.__getitem__, "gs://mine/out", shard_rows=10, progress=stop)
    assert list(bucket.iterdir()) == []


def test_a_bucket_that_array_record_cannot_read(bucket, monkeypatch):
    build(numbered(5), FILES.__getitem__, "gs://mine/out")
    monkeypatch.setattr(Storage, "do_GET", lambda self: self.send_error(403))
    with pytest.raises(
        UserError, match="cannot be read: Permanent error, .*; if the bucket cannot be read from here, mount it"
    ):
        opened("gs://mine/out")


def test_a_bucket_without_its_client(monkeypatch):
    def absent(name: str):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", absent)
    with pytest.raises(UserError, match="gs://mine/x cannot be written: Please install gcsfs .*, or mount the bucket"):
        build(ROWS, FILES.__getitem__, "gs://mine/x")
    with pytest.raises(UserError, match="gs://mine/x cannot be read: Please install gcsfs .*, or mount the bucket"):
        opened("gs://mine/x")
