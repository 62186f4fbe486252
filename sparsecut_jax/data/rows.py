"""Rows by number, without holding them in memory: JSON and JSONL files are mapped, and a row is parsed when asked for.

Worker processes get a path and the byte ranges of the rows, which are also a mapped file.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import itertools
import json
import mmap
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from sparsecut_jax.data.broken_json import LONGEST, fault_of
from sparsecut_jax.data.kinds import BOM
from sparsecut_jax.data.scratch import MappedArray
from sparsecut_jax.data.unpacked import DataFile, unpacked
from sparsecut_jax.types import BadSample, UserError

Row = dict[str, Any]
# Strings, including an unterminated one, and brackets. "+" after a quantifier: no backtracking.
STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
SOLID = re.compile(rb"[^ \t\r\n]")
LINE = re.compile(rb"[^ \t\r\n][^\n]*")  # without leading white space; empty lines are skipped
SPACE = b" \t\r\n"


class Subset(Sequence):
    """A selection of rows by number."""

    def __init__(self, rows: Sequence, numbers: np.ndarray):
        self.rows, self.numbers = rows, MappedArray(np.asarray(numbers, np.int64))

    def __len__(self) -> int:
        return len(self.numbers.values)

    def __getitem__(self, i: int) -> Row:
        return self.rows[int(self.numbers.values[i])]

    def place(self, i: int) -> str:
        return place(self.rows, int(self.numbers.values[i]))


def place(rows: Sequence, i: int) -> str:
    """The file of row `i` among several and its number there; "" if the overall number suffices."""
    return rows.place(i) if hasattr(rows, "place") else ""


class JsonRows(Sequence):
    """Rows of a JSON list of objects, or of a JSONL file with one object a line; local or gs://.

    `rows[i]` is the parsed object. Raises BadSample for a row that is not valid JSON or UTF-8.
    """

    def __init__(self, path: str, local: str = ""):
        """Finds the byte range of each row. Raises UserError for a file that cannot be read or holds no list.

        local: the file that `unpacked` returned; "": not unpacked yet.
        """
        self.path = path
        try:
            self.file = DataFile.of(path, local or unpacked(path)[0], "json")
            self.places = MappedArray(_places(self._bytes, path))
        except OSError as error:
            raise UserError(f"data source {path!r} cannot be read: {error.strerror}") from error
        if not len(self):
            raise UserError(f"data source {path!r} is an empty list; expected at least one row")

    @functools.cached_property
    def _bytes(self) -> mmap.mmap:
        return self.file.mapped()

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
    """Whether a source is a folder, local or gs://. Raises UserError if it does not exist."""
    try:
        source = epath.Path(path)
        if path and source.is_dir():
            return True
        if not path or not source.exists():
            raise UserError(
                f"data source {path!r} does not exist; expected 'easy_vqa', 'scenes', 'tfds:NAME', the folder of a "
                "dataset or of shards, or a JSON, JSONL, Parquet, Arrow or tar file"
            )
        return False
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data source {path!r} cannot be read: {error}") from error
    except KeyError:
        raise UserError(f"data source {path!r} cannot be read: expected a file on a disk, or gs://...") from None


def _places(data: mmap.mmap | bytes, path: str) -> np.ndarray:
    """int64[n, 2]: first byte of each row and the one after its last."""
    begin = len(BOM) if data[: len(BOM)] == BOM else 0
    found = SOLID.search(data, begin)
    if found and found[0] == b"[":
        return _list_places(data, found.start(), path)
    if found and found[0] == b"{":
        end = data.find(b"\n", found.start(), found.start() + LONGEST)
        end = len(data) if end < 0 and len(data) < found.start() + LONGEST else end
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(data[found.start() : max(end, 0)].decode("utf-8", "replace"))
            return _to_array(itertools.chain.from_iterable(line.span() for line in LINE.finditer(data, begin)))
    return _refuse(data, begin, path)


def _to_array(places: Iterable[int]) -> np.ndarray:
    return np.fromiter(places, np.int64).reshape(-1, 2)


def _list_places(data: mmap.mmap | bytes, begin: int, path: str) -> np.ndarray:
    """Byte ranges of the objects of the list that begins at `begin`: strings are skipped and brackets counted, nothing
    is parsed."""
    first = SOLID.search(data, begin + 1)
    if not first or first[0] not in b"{[":
        return _refuse(data, begin, path)
    depth, places, start, close = 0, array.array("q"), 0, -1
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
                places.extend((start, at + 1))
            elif depth <= 0:
                close = at
                break
    places = np.frombuffer(places, np.int64).reshape(-1, 2)
    whole = close >= 0 and data[close] == 93 and not SOLID.search(data, close + 1)  # 93: a bracket
    between = lambda a, b: data[a:b] == b"," or data[a:b].strip(SPACE) == b","
    gaps = enumerate(zip(places[:-1, 1], places[1:, 0], strict=True))
    wrong = next((i for i, (a, b) in gaps if not between(a, b)), len(places) - 1)
    if wrong == len(places) - 1 >= 0 and whole and not data[places[-1, 1] : close].strip(SPACE):
        return places
    return _refuse(data, begin, path, wrong, int(places[wrong, 0]) if len(places) else -1)


def _refuse(data: mmap.mmap | bytes, begin: int, path: str, row: int = 0, at: int = -1) -> np.ndarray:
    """Raises UserError if the file is not valid after the row at byte `at`; returns no byte ranges for an empty
    list."""
    error = fault_of(data, begin, path, row, at)
    if error:
        raise error
    return _to_array(())
