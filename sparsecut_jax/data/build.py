"""Writes rows and their image files as one TFDS dataset in ArrayRecord format, without TensorFlow.

    dataset_info.json  features.json  metadata.json
    rows-train.array_record-00000  rows-train.array_record-00001  ...

Row i is record i. Image files are kept byte for byte. Plain `tfds.builder_from_directory(folder)` reads it as
{"id", "images": [encoded file], "image_names", "row": the whole row as JSON}; `tfds_source` gives the rows back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from sparsecut_jax.data.tfds_source import FORMAT
from sparsecut_jax.text.conversation import images_of
from sparsecut_jax.types import BadSample, UserError

READERS = 16  # threads that prefetch rows and images: buckets and network drives have high latency
F = tfds.features


@dataclasses.dataclass
class Built:
    """What a build wrote.

    Attributes:
      bytes: size of the records before the shards' compression.
      skipped: a sentence with the row number for each row left out.
    """

    rows: int = 0
    images: int = 0
    bytes: int = 0
    shards: int = 0
    seconds: float = 0.0
    skipped: list[BadSample] = dataclasses.field(default_factory=list)


def build(
    rows: Sequence[dict[str, Any]],
    read_bytes: Callable[[str | bytes], bytes],
    out: str,
    shard_rows: int = 10_000,
    description: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    skip: bool = False,
) -> Built:
    """Writes `rows` into the new folder `out`, local or gs://, completely or not at all.

    A local folder is renamed at the end. To a bucket, full shards are uploaded one by one and dataset_info.json last,
    without which the folder is not read.

    Args:
      rows: rows[i] with images by name or as encoded files; called from several threads.
      read_bytes: the encoded file of such an image; called from several threads. It raises BadSample for one that
        cannot be opened, so that broken images are never packed.
      progress: called with the rows done and all rows, for every row.
      skip: leave out the rows for which `rows` or `read_bytes` raise BadSample, instead of stopping.

    Raises:
      UserError: `out` is not empty or cannot be written, or nothing is left to write.
      BadSample: the first broken row.
    """
    if shard_rows < 1:
        raise UserError(f"shard_rows={shard_rows}: expected at least 1")
    started, target = time.monotonic(), epath.Path(out).expanduser()
    bucket = "://" in os.fspath(target)
    staging = _new_folder(target, bucket)
    try:
        built = _write(rows, read_bytes, staging, target if bucket else None, shard_rows, description, progress, skip)
        if not bucket:
            os.rename(staging, target)
    except BaseException as error:
        if bucket:
            with contextlib.suppress(Exception):
                target.rmtree()
        if isinstance(error, OSError) or type(error) is RuntimeError:  # array_record's "No space left on device"
            raise UserError(f"{out} cannot be written: {error}") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    built.seconds = time.monotonic() - started
    return built


def _new_folder(target: epath.Path, bucket: bool) -> str:
    """A local folder to write to; beside `target` if that is local, so that it can be renamed."""
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} already exists and is not empty; name a new folder or delete it")
        if bucket:
            return tempfile.mkdtemp(prefix="sparsecut_jax_build_")
        folder = f"{target}.partial-{uuid.uuid4().hex[:8]}"
        os.makedirs(folder)
        return folder
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    except ImportError as error:  # etils lacks the bucket's client
        raise UserError(f"{target} cannot be written: {error}, or mount the bucket (gcsfuse)") from error


def _write(
    rows: Sequence[dict[str, Any]],
    read_bytes: Callable[[str | bytes], bytes],
    folder: str,
    bucket: epath.Path | None,
    shard_rows: int,
    description: str,
    progress: Callable[[int, int], None],
    skip: bool,
) -> Built:
    """Writes the dataset to `folder`, or through it to `bucket`; then it never holds more than one shard."""
    metadata = tfds.core.MetadataDict(format=FORMAT)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="rows", version=tfds.core.Version("1.0.0"), data_dir=folder, module_name=__name__
        ),
        features=F.FeaturesDict(
            {
                "id": F.Text(),
                "images": F.Sequence(F.Tensor(shape=(), dtype=np.object_)),
                "image_names": F.Sequence(F.Text()),
                "row": F.Text(),
            }
        ),
        description=description or "Conversations about images.",
        disable_shuffling=True,
        metadata=metadata,
    )
    writer = tfds.core.SequentialWriter(info, shard_rows, file_format="array_record")
    writer.initialize_splits(["train"])
    built, digest = Built(), hashlib.sha256()

    def finish_shards() -> None:
        split = info.splits["train"]
        for number in range(built.shards, len(split.shard_lengths)):
            _finish_shard(os.fspath(split.filepaths[number]), split.shard_lengths[number], bucket)
            built.shards += 1

    examples = _examples(rows, read_bytes, built, digest, progress, skip)
    for first in examples:
        shard = itertools.chain([first], itertools.islice(examples, shard_rows - 1))
        writer.add_examples({"train": shard})
        finish_shards()
    if not built.rows:
        first = f"; the first: {built.skipped[0]}" if built.skipped else ""
        raise UserError(f"no row to write: {len(built.skipped)} of {len(rows)} were left out{first}")
    metadata["sha256"] = digest.hexdigest()
    writer.close_all()
    finish_shards()
    built.bytes = int(info.splits["train"].num_bytes)
    for name in ("features.json", "metadata.json", "dataset_info.json"):
        _publish(os.path.join(folder, name), bucket)
    return built


def _examples(
    rows: Sequence[dict[str, Any]],
    read_bytes: Callable[[str | bytes], bytes],
    built: Built,
    digest: Any,
    progress: Callable[[int, int], None],
    skip: bool,
) -> Iterator[dict[str, Any]]:
    """Records in the order of the rows, prefetched by threads. Counts them and hashes their content."""

    def read(i: int) -> dict[str, Any] | BadSample:
        at = f"row {i}"
        try:
            row = rows[i]
            if not isinstance(row, dict):
                raise BadSample("format", f"expected an object, got {type(row).__name__}")
            at += f" (id {row.get('id', '?')!r})"
            return _example(row, read_bytes)
        except BadSample as error:
            return BadSample(error.cause, f"{at}: {error}")
        except OSError as error:
            raise UserError(f"{at} cannot be read: {error}") from error

    if not len(rows):
        return
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * READERS)
    ahead = grain.MapDataset.range(len(rows)).map(read).to_iter_dataset(options)
    for done, example in enumerate(ahead, start=1):
        if isinstance(example, BadSample):
            if not skip:
                raise example
            built.skipped.append(example)
        else:
            built.rows += 1
            built.images += len(example["images"])
            for part in (example["row"], *example["images"]):
                digest.update(part)
            yield example
        progress(done, len(rows))


def _example(row: dict[str, Any], read_bytes: Callable[[str | bytes], bytes]) -> dict[str, Any]:
    """The record of a row. Raises BadSample."""
    entries = images_of(row)
    if not all(isinstance(entry, str | bytes) for entry in entries):
        raise BadSample("format", f"key 'image' must be a path or a list of paths, got {entries!r:.100}")
    images = [read_bytes(entry) for entry in entries]
    names = [entry if isinstance(entry, str) else hashlib.sha256(entry).hexdigest()[:16] for entry in entries]
    if names != entries:  # of images inside the row, the record keeps the files and its row the hashes
        key = "image" if "image" in row else "images"
        row = {**row, key: names if isinstance(row[key], list) else names[0]}
    # JSON escapes non-ASCII characters, so that half a surrogate pair survives as well.
    text = {"id": str(row.get("id", "")), "row": json.dumps(row)}
    encoded = {key: value.encode("utf-8", "replace") for key, value in text.items()}
    return encoded | {"images": images, "image_names": [name.encode("utf-8", "replace") for name in names]}


def _finish_shard(file: str, records: int, bucket: epath.Path | None) -> None:
    reader = ArrayRecordReader(file)
    written = reader.num_records()
    reader.close()
    if written != records:
        raise OSError(f"{file} holds {written} records after writing {records}")
    _publish(file, bucket)


def _publish(file: str, bucket: epath.Path | None) -> None:
    """Flushes a finished file to disk, or moves it to the bucket."""
    if bucket is None:
        with open(file, "rb") as written:
            os.fsync(written.fileno())  # a rename may reach the disk before earlier writes
        return
    bucket.mkdir(parents=True, exist_ok=True)
    copy = bucket / os.path.basename(file)
    epath.Path(file).copy(copy, overwrite=True)
    if copy.stat().length != os.path.getsize(file):
        raise OSError(f"{copy} has {copy.stat().length} bytes, expected {os.path.getsize(file)}")
    os.remove(file)
