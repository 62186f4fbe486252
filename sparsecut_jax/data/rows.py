"""Rows by number, without holding them in memory: JSON and JSONL files are mapped, and a row is parsed when asked for.

What goes to worker processes is a path and the row's places in the file, themselves a mapped file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from sparsecut_jax.types import BadSample, UserError

Row = dict[str, Any]
# Strings, also one that the file ends in, and brackets. "+" behind a quantifier: what has matched is never tried again.
STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
SOLID = re.compile(rb"[^ \t\r\n]")
LINE = re.compile(rb"[^ \t\r\n][^\n]*")  # without the white space in front; an empty one is none
BOM = b"\xef\xbb\xbf"
SPACE = b" \t\r\n"


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    """A folder for arrays that worker processes map; it goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="sparsecut_jax_")


class MappedArray:
    """An array that crosses to other processes as the name of a file."""

    def __init__(self, values: np.ndarray):
        handle, self.path = tempfile.mkstemp(suffix=".npy", dir=scratch().name)
        with os.fdopen(handle, "wb") as file:
            np.save(file, values)

    @functools.cached_property
    def values(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}


class Subset(Sequence):
    """The rows `numbers` of other rows."""

    def __init__(self, rows: Sequence, numbers: np.ndarray):
        self.rows, self.numbers = rows, MappedArray(np.asarray(numbers, np.int64))

    def __len__(self) -> int:
        return len(self.numbers.values)

    def __getitem__(self, i: int) -> Row:
        return self.rows[int(self.numbers.values[i])]


class JsonRows(Sequence):
    """Rows of a JSON list of objects, or of a JSONL file with one object a line; local or gs://.

    `rows[i]` is the parsed object. Raises BadSample for a row that is no JSON or no UTF-8.
    """

    def __init__(self, path: str):
        """Finds where each row stands. Raises UserError for a file that cannot be read or holds no list."""
        self.path = path
        try:
            self.local = _local(path)
            self.state = _state(os.stat(self.local))
            self.places = MappedArray(_places(self._bytes, path))
        except OSError as error:
            raise UserError(f"data source {path!r} cannot be read: {error.strerror}") from error
        if not len(self):
            raise UserError(f"data source {path!r} is an empty list; expected at least one row")

    @functools.cached_property
    def _bytes(self) -> mmap.mmap | bytes:
        with open(self.local, "rb") as file:
            if _state(os.fstat(file.fileno())) != self.state:  # its rows are no longer where they were
                raise UserError(f"data source {self.path!r} has changed since this run opened it; start again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(self.local) else b""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_bytes"}

    def __len__(self) -> int:
        return len(self.places.values)

    def __getitem__(self, i: int) -> Row:
        start, end = self.places.values[i].tolist()
        try:
            return json.loads(self._bytes[start:end].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadSample("text", f"it is not UTF-8: byte {start + error.start} of the file") from None
        except (ValueError, RecursionError) as error:
            raise BadSample("text", f"it is not valid JSON: {error}") from None

    def fingerprint(self) -> str:
        """Number of rows and a hash of the file."""
        return f"{len(self)} rows, sha256 {hashlib.sha256(self._bytes).hexdigest()[:16]}"


def is_folder(path: str) -> bool:
    """Whether a source is a folder, local or gs://. Raises UserError if nothing is there."""
    try:
        source = epath.Path(path)
        if path and source.is_dir():
            return True
        if not path or not source.exists():
            raise UserError(
                f"data source {path!r} is not there; expected 'easy_vqa', 'scenes', 'tfds:NAME', the folder of a "
                "dataset, or a JSON or JSONL file of conversations"
            )
        return False
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data source {path!r} cannot be read: {error}") from error
    except KeyError:
        raise UserError(f"data source {path!r} cannot be read: expected a file on a disk, or gs://...") from None


def _local(path: str) -> str:
    """The file itself, or a copy of one that lies in a bucket."""
    if "://" not in path:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a named pipe would wait for ever
            raise UserError(f"data source {path!r} cannot be read: it is no regular file")
        return path
    handle, copy = tempfile.mkstemp(suffix=".json", dir=scratch().name)
    with os.fdopen(handle, "wb") as target, epath.Path(path).open("rb") as file:
        shutil.copyfileobj(file, target)
    return copy


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _places(data: mmap.mmap | bytes, path: str) -> np.ndarray:
    """int64[n, 2]: first byte of each row and the one behind it."""
    begin = len(BOM) if data[: len(BOM)] == BOM else 0
    found = SOLID.search(data, begin)
    if found and found[0] == b"[":
        return _list_places(data, found.start(), path)
    if found and found[0] == b"{":
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(LINE.search(data, begin)[0].decode("utf-8", "replace"))
            return _to_array([line.span() for line in LINE.finditer(data, begin)])
    return _refuse(data, path)


def _to_array(places: list[tuple[int, int]]) -> np.ndarray:
    return np.array(places, np.int64).reshape(-1, 2)


def _list_places(data: mmap.mmap | bytes, begin: int, path: str) -> np.ndarray:
    """Places of the objects of the list that begins at `begin`: strings are skipped and brackets counted, nothing is
    parsed."""
    depth, places, start, close = 0, [], 0, -1
    for found in STRUCTURE.finditer(data, begin):
        at = found.start()
        byte = data[at]
        if byte == 34:  # a string
            continue
        if byte in b"[{":
            depth += 1
            if depth == 2:
                start = at
        else:
            depth -= 1
            if depth == 1:
                places.append((start, at + 1))
            elif depth <= 0:
                close = at
                break
    places = _to_array(places)
    between = [b"", *(b"," for _ in range(len(places) - 1)), b""]
    gaps = zip([begin + 1, *places[:, 1].tolist()], [*places[:, 0].tolist(), close], strict=True)
    whole = close >= 0 and data[close] == 93 and not bytes(data[close + 1 :]).strip(SPACE)  # 93: a bracket
    if (
        len(places)
        and whole
        and all(bytes(data[a:b]).strip(SPACE) == c for (a, b), c in zip(gaps, between, strict=True))
    ):
        return places
    return _refuse(data, path)


def _refuse(data: mmap.mmap | bytes, path: str) -> np.ndarray:
    """Raises UserError with what is wrong with the file as a whole; of an empty list no places."""
    try:
        rows = json.loads(bytes(data).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"data source {path!r} is not valid JSON: {error}") from error
    if rows == []:
        return _to_array([])
    if not isinstance(rows, list):
        raise UserError(f"data source {path!r}: expected a list of rows, got {type(rows).__name__}")
    i, row = next((i, row) for i, row in enumerate(rows) if not isinstance(row, dict))
    raise UserError(f"{path} row {i}: expected an object, got {type(row).__name__}")
