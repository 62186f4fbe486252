"""Opens the rows of a path in any supported format: one file, or a folder of shards."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence

from sparsecut_jax.data.columns import DEFAULT, Spelled
from sparsecut_jax.data.rows import JsonRows, Row
from sparsecut_jax.data.unpacked import DataFile, unpacked
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.types import UserError, nearest

ENDINGS = {"parquet": "tables", "arrow": "tables", "feather": "tables", "tar": "tars", "tgz": "tars"}
SHARD = re.compile(r"(.*?)[-_.]?0*(\d+)-of-0*(\d+)\b.*")
SPLIT = re.compile(r"(?i)(train|validation|valid|val|dev|test|eval)(?![a-z])")
UNFINISHED = (".incomplete", ".part", ".crdownload", ".tmp", ".partial")


def is_shards(folder: str) -> bool:
    """Whether a local folder holds shards that this module reads, or datasets of `save_to_disk`.

    Raises:
      UserError: it cannot be read, or its subfolders hold shards.
    """
    if "://" in folder:
        return False
    try:
        names = set(os.listdir(folder))
        if "features.json" in names:  # a TFDS dataset
            return False
        if names & {"state.json", "dataset_dict.json"} or any(map(_ending, names)):
            return True
        inner = [entry.path for entry in os.scandir(folder) if entry.is_dir() and any(map(_ending, os.listdir(entry)))]
    except OSError as error:
        raise UserError(f"data source {folder!r} cannot be read: {error.strerror or error}") from error
    if inner:
        raise UserError(
            f"data source {folder!r} contains no shards itself; name one of its folders: {', '.join(sorted(inner))}"
        )
    return False


def open_rows(source: SourceConfig) -> Sequence[Row]:
    """The rows of `source.path`, a file or a folder of which `is_shards` is true.

    Raises:
      UserError: it cannot be read, or holds no rows.
    """
    if "://" not in source.path and os.path.isdir(source.path):
        return _open(_shards(source.path, source.split), source)
    if source.split != DEFAULT.split:
        raise UserError(f"data source {source.path!r} is one file and has no split {source.split!r}; leave split out")
    local, kind = unpacked(source.path)
    if kind == "json":
        return Spelled(JsonRows(source.path, local), source)
    return _open([DataFile.of(source.path, local, kind)], source)


def _open(files: list[DataFile], source: SourceConfig) -> Sequence[Row]:
    if all(file.kind == "tar" for file in files):
        from sparsecut_jax.data.tars import TarRows

        named = dataclasses.replace(source, image=source.image and DEFAULT.image)  # what TarRows calls its pictures
        return Spelled(TarRows(files, source.image), named)
    for file in files:
        if file.kind in ("tar", "json"):
            raise UserError(
                f"data source {file.path!r} has the format {file.kind}; expected {files[0].kind}, like the other files"
            )
    from sparsecut_jax.data.tables import TableRows

    return TableRows(files, source)


def _ending(name: str) -> str:
    """ "tables" or "tars" by a file's name, "" for any other; hidden files are ignored."""
    if name.startswith((".", "_")):
        return ""
    plain = re.sub(r"\.(gz|zst|bz2|lz4)$", "", name.lower())
    return ENDINGS.get(plain.rpartition(".")[2], "")


def _shards(folder: str, split: str) -> list[DataFile]:
    """The files of a folder in the order of their names, or in the order that `save_to_disk` recorded."""
    try:
        names = sorted(os.listdir(folder))
        if "dataset_dict.json" in names:
            return _shards(_of_split(folder, split), split)
        if "state.json" in names:
            with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
                shards = [entry["filename"] for entry in json.load(file)["_data_files"]]
            if not shards:
                raise UserError(f"data source {folder!r} has no rows; expected at least one")
        else:
            shards = _chosen(folder, names, split)
        files = []
        for name in shards:
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                raise UserError(f"data source {folder!r} is incomplete: {name} is missing")
            files.append(DataFile.of(path, *unpacked(path)))
        return files
    except OSError as error:
        raise UserError(f"data source {folder!r} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data source {folder!r}: its state.json or dataset_dict.json cannot be read: {error}"
        ) from error


def _of_split(folder: str, split: str) -> str:
    """The folder of a split of a DatasetDict."""
    with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
        known = json.load(file)["splits"]
    if split not in known:
        raise UserError(
            f"data source {folder!r} has no split {split!r}{nearest(split, known)}; it has {', '.join(known)}: "
            f"name one, as in {os.path.join(folder, known[0] if known else 'train')}"
        )
    return os.path.join(folder, split)


def _chosen(folder: str, names: list[str], split: str) -> list[str]:
    """The shards among the names of a folder, only those of the split if they name splits. Raises UserError."""
    kinds = {name: _ending(name) for name in names if _ending(name)}
    unfinished = [name for name in names if name.lower().endswith(UNFINISHED)]
    if unfinished:
        raise UserError(
            f"data source {folder!r} contains the unfinished download {unfinished[0]}; finish it or delete it"
        )
    if len(set(kinds.values())) > 1:
        tables, tars = (next(name for name in kinds if kinds[name] == kind) for kind in ("tables", "tars"))
        raise UserError(
            f"data source {folder!r} contains {tables} and {tars}; name one of them, or a folder with only one format"
        )
    splits = {name: found[1].lower() if (found := SPLIT.match(name)) else "" for name in kinds}
    known = sorted(set(splits.values()))
    if len(known) > 1 and split not in known:
        example = next(name for name in kinds)
        raise UserError(
            f"data source {folder!r} has no split {split!r}; it has {', '.join(filter(None, known))}: name a file, "
            f"as in {os.path.join(folder, example)}, or set split=... in config.data.mix"
        )
    if len(known) > 1 and "" in known:
        stray = next(name for name in splits if not splits[name])
        raise UserError(
            f"data source {folder!r} has files of split {split}, but {stray} belongs to no split; move it away"
        )
    shards = [name for name in kinds if len(known) == 1 or splits[name] == split]
    _check_numbers(folder, shards)
    return shards


def _check_numbers(folder: str, shards: list[str]) -> None:
    """Raises UserError if one of the files 1-of-3, 2-of-3, ... is missing."""
    groups: dict[tuple[str, int], set[int]] = {}
    for name in shards:
        if found := SHARD.fullmatch(name):
            groups.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (prefix, count), numbers in groups.items():
        first = 0 if 0 in numbers else 1
        missing = [number for number in range(first, first + count) if number not in numbers]
        if missing:
            raise UserError(
                f"data source {folder!r} is incomplete: of {count} files {prefix}..., number {missing[0]} is missing"
            )
