"""Rows of a TFDS dataset in ArrayRecord format: one written by `data build`, or any other with pictures and texts.

Read by random access and without TensorFlow; nothing is downloaded. Pictures stay encoded until `open`. Worker processes
receive names and lengths of files and open the files themselves.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from PIL import Image

from sparsecut_jax.data.images import read_image
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.text.conversation import GPT, HUMAN, IMAGE
from sparsecut_jax.types import BadSample, UserError, first_line, nearest

FORMAT = "sparsecut_jax rows 1"  # in the metadata.json of a folder that `build` wrote
Row = dict[str, Any]


def open_tfds(source: SourceConfig, max_pixels: int) -> TfdsRows:
    """The rows of `source.path`: "tfds:NAME[/CONFIG][:VERSION]" or the folder of a prepared dataset, local or gs://.

    Raises:
      UserError: the dataset does not exist, has no random access, or lacks the split or a feature of the config.
    """
    builder = _builder(source)
    info = builder.info
    if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
        raise UserError(
            f"{source.path} is stored as {info.file_format.value}, which has no random access; on a machine with "
            f"TensorFlow run `tfds convert_format --dataset_version_dir={info.data_dir} --out_file_format=array_record`"
        )
    try:
        metadata = info.metadata
    except Exception as error:  # not JSON, not text, or not a file
        raise UserError(f"{source.path}: metadata.json cannot be read: {first_line(error)}") from error
    built = isinstance(metadata, dict) and metadata.get("format") == FORMAT
    return (BuiltRows if built else MappedRows)(builder, source, max_pixels)


class TfdsRows(Sequence):
    """The records of one split. `rows[i]` is a row whose images are `bytes`.

    Indexing raises BadSample for a record that is damaged or does not form a row.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, source: SourceConfig, max_pixels: int):
        self.name, self.max_pixels = f"{source.path}, split {source.split!r}", max_pixels
        self.reading = [source.split]  # settings that determine the rows
        self.folder = str(builder.info.data_dir)
        self.specs: dict[str, Any] = {}  # {feature: its dtype and shape}, for the features that are read
        known = sorted(builder.info.splits)
        base = re.match(r"\w*", source.split)[0]
        if base not in known:
            raise UserError(f"{source.path} has no split {base!r}{nearest(base, known)}; known: {', '.join(known)}")
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            self.records = builder.as_data_source(
                source.split, deserialize_method=raw, file_format="array_record"
            ).data_source
            parts = builder.info.splits[source.split].file_instructions
        except Exception as error:  # TFDS parses "train[:10%]" and raises many kinds of errors
            raise UserError(f"{source.path}: split {source.split!r} cannot be read: {first_line(error)}") from error
        self.files = sorted({os.fspath(part.filename) for part in parts})
        there = {path.name for path in epath.Path(self.folder).iterdir()}
        for file in self.files:
            if os.path.basename(file) not in there:
                raise UserError(f"{source.path} is incomplete: {file} does not exist; copy or build it again")
        _check_shard(os.fspath(parts[0].filename), parts[0].examples_in_shard)

    def __len__(self) -> int:
        return len(self.records)

    def open(self, entry: bytes) -> Image.Image:
        """The RGB picture of a row's image entry."""
        return read_image(entry, self.max_pixels)

    def fingerprint(self) -> str:
        """Number of rows, and a hash of settings, metadata and the shards' names and sizes. Reads no record."""
        digest = hashlib.sha256(repr(self.reading).encode())
        for path in sorted(epath.Path(self.folder).iterdir()):
            if path.suffix in (".json", ".txt"):  # label names are in text files
                digest.update(path.read_bytes())
        for file in self.files:
            digest.update(f"{os.path.basename(file)} {_size(file)}\n".encode())
        return f"{len(self)} rows, sha256 {digest.hexdigest()[:16]}"

    def _example(self, i: int) -> dict[str, Any]:
        """Values of the features of a record: encoded pictures and texts are bytes, labels are numbers."""
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        try:
            record = self.records[i]
            if not record:  # the reader's answer for a record beyond the end of a truncated shard
                raise ValueError("it is empty")
            return tfds.core.example_parser.ExampleParserNp(self.specs).parse_example(record)
        except Exception as error:  # a damaged block, a record that is not an example, a missing feature
            raise BadSample("format", f"the record cannot be read: {first_line(error)}") from error


class BuiltRows(TfdsRows):
    """Rows that `data build` wrote, unchanged except that encoded images replace their names."""

    def __init__(self, builder: tfds.core.DatasetBuilder, source: SourceConfig, max_pixels: int):
        super().__init__(builder, source, max_pixels)
        specs = builder.info.features.get_serialized_info()
        self.specs = {name: specs[name] for name in ("row", "images")}

    def __getitem__(self, i: int) -> Row:
        example = self._example(i)
        try:
            row, images = json.loads(example["row"]), list(example["images"])
        except (ValueError, TypeError, RecursionError) as error:
            raise BadSample("text", f"the record's row is not valid JSON: {error}") from None
        if images and isinstance(row, dict):
            key = "image" if "image" in row else "images"
            row[key] = images if isinstance(row[key], list) else images[0]
        return row


class MappedRows(TfdsRows):
    """One question and one answer per example, from the features that the config names.

    A nested feature is "a/b". From a list of texts (several captions) the first is used, from a list of pictures all. A
    label becomes its name, a number its digits.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, source: SourceConfig, max_pixels: int):
        super().__init__(builder, source, max_pixels)
        self.split = source.split
        self.reading += [source.image, source.question, source.answer]
        self.features = dict(sorted(_leaves(builder.info.features)))
        serialized = tfds.core.utils.flatten_nest_dict(builder.info.features.get_serialized_info())
        self.image, self.question, self.answer = source.image, source.question, source.answer
        self.literal = source.question not in self.features
        wanted = {"image": self.image, "question": "" if self.literal else self.question, "answer": self.answer}
        for setting, name in wanted.items():
            if name not in self.features and (name or setting == "answer"):
                raise self._unknown(setting, name)
            if name:
                self._check_kind(setting, name, serialized[name])
        if self.literal and re.fullmatch(r"[\w/]+", self.question):  # a word, not a question
            raise self._unknown("question", self.question)
        if not self.image and self.literal and (not self.question or IMAGE in self.question):
            raise UserError(
                f"{self.name}: question={self.question!r} asks about a picture, but image='' names no feature; set image"
            )
        self.specs = {name: serialized[name] for name in wanted.values() if name}
        self.features = {name: self.features[name] for name in self.specs}

    def __getitem__(self, i: int) -> Row:
        example = self._example(i)
        row, images = {"id": f"{self.split}/{i}"}, 0
        if self.image:
            picture = example[self.image]
            several = not isinstance(picture, bytes)
            row["images" if several else "image"] = list(picture) if several else picture
            images = len(picture) if several else 1
        question = self.question if self.literal else self._text(self.question, example, "format")
        if IMAGE not in question:
            question = IMAGE * images + ("\n" if images and question else "") + question
        answer = self._text(self.answer, example, "no_answer")
        row["conversations"] = [{"from": HUMAN, "value": question}, {"from": GPT, "value": answer}]
        return row

    def _text(self, name: str, example: dict[str, Any], cause: str) -> str:
        value, feature = example[name], self.features[name]
        while isinstance(value, (list, np.ndarray)):
            if not len(value):
                raise BadSample(cause, f"feature {name!r} is an empty list")
            value = value[0]
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadSample("text", f"feature {name!r} is not UTF-8: {error}") from None
        if isinstance(feature, tfds.features.ClassLabel):
            if value < 0:  # TFDS's marker in test splits without labels
                raise BadSample(cause, f"feature {name!r} has no label")
            return feature.int2str(int(value))
        return str(np.dtype(self.specs[name].np_dtype).type(value))  # in its own precision: 3.1, not 3.0999999

    def _unknown(self, setting: str, name: str) -> UserError:
        known = ", ".join(self.features)
        return UserError(f"{self.name} has no feature {setting}={name!r}{nearest(name, self.features)}; known: {known}")

    def _check_kind(self, setting: str, name: str, spec: Any) -> None:
        """Raises UserError if a feature is not an encoded picture, or not a text, label or number."""
        picture = isinstance(self.features[name], tfds.features.Image)
        scalar = spec.shape[spec.sequence_rank :] == ()
        encoded = picture or scalar and spec.np_dtype == np.object_
        if setting == "image" and not (encoded and spec.sequence_rank <= 1):
            expected = "an encoded picture or a list of them"
        elif setting != "image" and (picture or not scalar):
            expected = "a text, a label, a number or a list of them"
        else:
            return
        raise UserError(f"{self.name}: {setting}={name!r} is {self.features[name]}; expected {expected}")


def _builder(source: SourceConfig) -> tfds.core.DatasetBuilder:
    """TFDS's builder for a prepared dataset. Raises UserError if there is none."""
    name = source.path.removeprefix("tfds:")
    try:
        if name != source.path:
            return tfds.core.read_only_builder.builder_from_files(name, data_dir=source.data_dir or None)
        folder = epath.Path(source.path).expanduser()
        for path in os.listdir(folder) if os.path.isdir(folder) else ():
            if not os.path.isfile(folder / path) and not os.path.isdir(folder / path):
                raise UserError(f"{folder / path} is not a regular file; remove it")  # opening a pipe would block
        if (folder / "dataset_info.json").exists():
            return tfds.builder_from_directory(folder)
        versions = sorted(str(path.parent) for path in folder.glob("*/dataset_info.json")) if folder.exists() else []
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        place = source.data_dir or "~/tensorflow_datasets"
        raise UserError(
            f"{source.path} is not prepared in {place}, and nothing is downloaded here; set data_dir to its folder, or run "
            f"`tfds build {name} --file_format=array_record`"
        ) from error
    except ImportError as error:  # the bucket's client is not installed
        raise UserError(f"{source.path} cannot be read: {first_line(error)}, or mount the bucket (gcsfuse)") from error
    except Exception as error:  # a name or files that TFDS cannot parse
        raise UserError(f"{source.path} cannot be read as a TFDS dataset: {first_line(error)}") from error
    other = " and no shards (.parquet, .arrow or .tar); of JSON files name one"
    hint = f"; did you mean {versions[-1]!r}?" if versions else other
    raise UserError(f"{source.path} is not the folder of a prepared TFDS dataset: it has no dataset_info.json{hint}")


def _leaves(feature: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b", feature) of every feature that holds values; a list counts as its elements."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for key, inner in feature.items():
            yield from _leaves(inner, f"{name}/{key}" if name else key)
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, name)
    else:
        yield name, feature


def _check_shard(file: str, records: int) -> None:
    """Raises UserError if a shard cannot be read, or its number of records differs from the metadata."""
    try:
        reader = ArrayRecordReader(file)  # supports gs://; reports an unreadable file only when closed
        count = reader.num_records()
        reader.close()
        if count == records:
            return
        reason = f"expected {records} records, got {count}"
    except RuntimeError as error:
        reason = first_line(error) if str(error) else "it is truncated or damaged"
    hint = "; if the bucket cannot be read from here, mount it (gcsfuse) and name that folder" * ("://" in file)
    raise UserError(f"{file} cannot be read: {reason}{hint}")


def _size(file: str) -> int:
    return epath.Path(file).stat().length if "://" in file else os.path.getsize(file)
