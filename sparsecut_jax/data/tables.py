"""Rows of Parquet and Arrow files, by number and without holding more than a few of them in memory.

Arrow files are mapped. A row group of a Parquet file is read when one of its rows is requested. Files with large row
groups, and compressed Arrow files, are first converted into a plain Arrow file in the scratch folder.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsecut_jax.data.columns import CONVERSATIONS, IMAGES, Spelling, spelling_of
from sparsecut_jax.data.rows import Row
from sparsecut_jax.data.scratch import MappedArray, scratch
from sparsecut_jax.data.unpacked import DataFile, no_room, sampled
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.types import BadSample, UserError, first_line

LARGE, HUGE = 1 << 25, 1 << 28  # bytes of a row group above which it is not read for one row if avoidable, and never
OPEN, GROUPS, BATCHES = 64, 4, 4096  # files, row groups and mapped batches that a process keeps
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
ROOM = 1 << 30  # bytes to leave free on the disk
ROWS = 64  # that are written at a time
_lock = threading.Lock()  # pyarrow's readers are not thread-safe


class TableRows(Sequence):
    """The concatenated rows of files. `rows[i]` has images as bytes or paths.

    Columns of bytes other than those of images and the conversation are not read.
    """

    def __init__(self, files: list[DataFile], source: SourceConfig):
        """Reads sizes and schemas. Raises UserError for a file that cannot be read, or lacks the columns."""
        self.files, self.columns = [], []
        groups = []  # file, group, rows
        prints = hashlib.sha256()
        for file in files:
            spelling, columns = _checked(file, functools.partial(_columns, source=source))
            if _checked(file, _must_be_written):
                file = _checked(file, functools.partial(_write_out, columns=columns))
            rows = _checked(file, _rows)
            prints.update(f"{spelling} {columns} {sampled(file.original)}\n".encode())
            groups += [(len(self.files), group, count) for group, count in enumerate(rows)]
            self.files.append(file)
            self.columns.append((spelling, columns))
        groups = np.array(groups, np.int64).reshape(-1, 3)
        groups[:, 2] = groups[:, 2].cumsum()
        self.groups = MappedArray(groups)
        self.digest = prints.hexdigest()[:16]
        if not len(self):
            raise UserError(f"data source {files[0].path!r} has no rows; expected at least one")

    @functools.cached_property
    def _table(self) -> tuple[list[int], list[tuple[int, int]], dict[int, int]]:
        """The end of each group, its file and number there, and the first row of each file."""
        files, groups, ends = self.groups.values.T.tolist()
        starts: dict[int, int] = {}
        for file, start in zip(files, [0, *ends], strict=False):
            starts.setdefault(file, start)
        return ends, list(zip(files, groups, strict=True)), starts

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}

    def __len__(self) -> int:
        ends = self._table[0]
        return ends[-1] if ends else 0

    def _find(self, i: int) -> tuple[int, int, int]:
        """File, group in it and row in that."""
        ends, groups, _ = self._table
        i = range(len(self))[i]
        at = bisect.bisect_right(ends, i)
        return *groups[at], i - (ends[at - 1] if at else 0)

    def __getitem__(self, i: int) -> Row:
        which, group, local = self._find(i)
        spelling, columns = self.columns[which]
        try:
            with _lock:
                read = _row_group if self.files[which].kind == "parquet" else _mapped_batch
                batch = read(self.files[which], group, columns)
            (values,) = batch.slice(local, 1).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BadSample(
                "format", f"row group {group} of the file cannot be read: {first_line(error).rstrip('.')}"
            ) from None
        return spelling.row(values)

    def place(self, i: int) -> str:
        """The file of row `i` and its number there, if there are several files."""
        if len(self.files) == 1:
            return ""
        which = self._find(i)[0]
        return f"row {range(len(self))[i] - self._table[2][which]} of {os.path.basename(self.files[which].path)}"

    def fingerprint(self) -> str:
        """Number of rows and a hash of columns and sampled bytes of the files."""
        return f"{len(self)} rows, sha256 {self.digest}"


# ----------------------------------------------------------------------------------------------------------------------
# files


def _checked(file: DataFile, read: Callable[[DataFile], Any]) -> Any:
    try:
        return read(file)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"data source {file.path!r} cannot be read as {file.kind.partition(' ')[0].capitalize()}: "
            f"{reason}; it may be truncated or damaged: download or write it again"
        ) from error


def _schema(file: DataFile) -> pa.Schema:
    return pq.read_schema(file.local) if file.kind == "parquet" else _reader(file).schema


def _rows(file: DataFile) -> list[int]:
    """Rows of each group."""
    opened = _open(file)
    if file.kind == "parquet":
        return [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    return [batch.num_rows for batch in opened]


@functools.lru_cache(maxsize=OPEN)
def _open(file: DataFile) -> Any:
    """A ParquetFile, or the mapped batches of an Arrow file."""
    file.check()
    if file.kind == "parquet":
        return pq.ParquetFile(file.local, memory_map=True, pre_buffer=False, buffer_size=1 << 20)
    return list(_batches(file))


def _reader(file: DataFile) -> Any:
    """pyarrow's reader of a mapped Arrow file, if that is complete."""
    mapped = pa.memory_map(file.local)
    if file.kind == "arrow file":
        return pa.ipc.open_file(mapped)
    mapped.seek(max(0, mapped.size() - 8))
    if not mapped.read().endswith(END):
        raise OSError("it has no end marker")
    mapped.seek(0)
    return pa.ipc.open_stream(mapped)


def _batches(file: DataFile) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file, in order."""
    reader = _reader(file)
    if file.kind == "arrow file":
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


@functools.lru_cache(maxsize=GROUPS)
def _row_group(file: DataFile, group: int, columns: tuple[str, ...]) -> pa.RecordBatch:
    table = _open(file).read_row_group(group, columns=list(columns)).combine_chunks()
    return _whole(table.to_batches()[0])


@functools.lru_cache(maxsize=BATCHES)
def _mapped_batch(file: DataFile, group: int, columns: tuple[str, ...]) -> pa.RecordBatch:
    return _whole(_open(file)[group].select(list(columns)))


def _whole(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch. Raises ArrowInvalid for offsets outside it: reading there would crash the process."""
    batch.validate(full=True)
    return batch


def _must_be_written(file: DataFile) -> bool:
    if file.kind != "parquet":
        return _is_compressed(file)
    metadata = _open(file).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    room = shutil.disk_usage(scratch()).free - sum(sizes) > ROOM
    return max(sizes, default=0) > (LARGE if room else HUGE)


def _is_compressed(file: DataFile) -> bool:
    """Whether reading an Arrow file takes extra memory because its buffers are not stored as they are used."""
    before = pa.total_allocated_bytes()
    batch = next((batch for batch in _batches(file) if batch.num_rows), None)
    return batch is not None and pa.total_allocated_bytes() - before > _whole(batch).nbytes // 2


def _write_out(file: DataFile, columns: tuple[str, ...]) -> DataFile:
    """The file as a plain Arrow file. Raises UserError if there is no room for it."""
    handle, target = tempfile.mkstemp(suffix=".arrow", dir=scratch())
    os.close(handle)
    try:
        schema = _schema(file)
        schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
        batches = _open(file).iter_batches(ROWS, columns=list(columns)) if file.kind == "parquet" else _batches(file)
        with pa.OSFile(target, "wb") as out, pa.ipc.new_file(out, schema) as writer:
            for batch in batches:
                writer.write_batch(_whole(batch).select(list(columns)))
                if shutil.disk_usage(scratch()).free < ROOM:
                    raise no_room(file.path)
    except BaseException:
        os.remove(target)
        raise
    return DataFile.of(file.path, target, "arrow file", file.original)


# ----------------------------------------------------------------------------------------------------------------------
# columns


def _columns(file: DataFile, source: SourceConfig) -> tuple[Spelling, tuple[str, ...]]:
    """The roles of the columns, and the columns to read."""
    schema, path = _schema(file), file.path
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"data source {path!r} has two columns with the same name: {', '.join(schema.names)}")
    pictures = [field.name for field in schema if _is_picture(field.type)]
    try:
        spelling = spelling_of(schema.names, source, pictures)
    except UserError as error:
        raise UserError(f"data source {path!r}: {error}") from None
    names = _labels(schema, spelling.answer)
    spelling = Spelling(spelling.image, spelling.conversation, spelling.question, spelling.answer, names)
    wanted = {spelling.image, *(IMAGES if spelling.image in IMAGES else ()), *CONVERSATIONS}
    for name in {spelling.question, spelling.answer} & set(schema.names):
        if not _is_json(schema.field(name).type):
            raise UserError(f"data source {path!r}: column {name!r} is {schema.field(name).type}; expected strings")
    return spelling, tuple(field.name for field in schema if field.name in wanted or _is_json(field.type))


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_picture(kind.value_type)
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _is_json(kind: pa.DataType) -> bool:
    """Whether JSON has values of this type: no bytes, times, decimals, ..."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_json(kind.storage_type)
    if pa.types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    if pa.types.is_dictionary(kind) or hasattr(kind, "value_type") and not pa.types.is_map(kind):
        return _is_json(kind.value_type)
    string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return string or number or pa.types.is_null(kind)


def _labels(schema: pa.Schema, name: str) -> tuple[str, ...]:
    """Names of a column of labels, which `datasets` stores with the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(features[name]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
