"""Rows of WebDataset tars, by number: members with the same key form a row, "a/1.jpg" and "a/1.json" those of the key "a/1".

The headers are scanned once; the members of a row are read by their offsets.
"""

from __future__ import annotations

import array
import functools
import hashlib
import json
import mmap
import os
import re
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsecut_jax.data.rows import Row
from sparsecut_jax.data.scratch import MappedArray
from sparsecut_jax.data.unpacked import DataFile, sampled
from sparsecut_jax.types import BadSample, UserError

NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and ending; hidden files have no key
PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2"}
TEXTS = {"txt", "text", "caption", "cls"}
OTHERS = {"mp4": "video", "webm": "video", "mkv": "video", "avi": "video", "mov": "video"} | dict.fromkeys(
    ("wav", "mp3", "flac", "ogg"), "audio"
)
OPEN = 64  # tars that a process keeps mapped


class TarRows(Sequence):
    """The concatenated rows of tars, each in the order of its keys' first members.

    `rows[i]` holds the keys of the .json member, the other texts by their endings, and pictures as bytes: `image`, or
    `images` in the order of their endings. The key is the `id` of a row that has none. Other members are not read.
    """

    def __init__(self, files: list[DataFile], image: str):
        """Scans the headers.

        Args:
          image: ending of the members that are pictures; "image": any of PICTURES, "": none.

        Raises:
          UserError: a tar that is truncated or damaged, a link, or two members with the same name.
        """
        self.files, self.image = files, image
        self.endings: list[str] = []
        members, keys, rows = array.array("q"), bytearray(), array.array("q")  # see _Index
        prints = hashlib.sha256(repr(image).encode())
        for number, file in enumerate(files):
            try:
                scanned = _scan(file, self.endings, prints)
            except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                reason = (str(error) or type(error).__name__).rstrip(".")
                raise UserError(
                    f"data source {file.path!r} cannot be read as a tar: {reason}; it may be truncated or damaged: "
                    "download or write it again"
                ) from error
            prints.update(sampled(file.local).encode())
            for key, parts in scanned.items():
                rows.extend((number, len(members) // 3, len(keys)))
                keys += key.encode("utf-8", "surrogateescape")
                members.extend(parts)
        if not rows:
            raise UserError(
                f"data source {files[0].path!r} has no members NAME.jpg, NAME.json, ...; expected at least one row"
            )
        rows.extend((len(files), len(members) // 3, len(keys)))
        self.rows = MappedArray(
            np.frombuffer(rows, np.int64).reshape(-1, 3)
        )  # file, first member, first byte of the key
        self.members = MappedArray(np.frombuffer(members, np.int64).reshape(-1, 3))  # ending, first byte, size
        self.keys = MappedArray(np.frombuffer(keys, np.uint8))
        self.digest = prints.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows.values) - 1

    def __getitem__(self, i: int) -> Row:
        i = range(len(self))[i]
        (number, first, _), (_, last, _) = self.rows.values[i : i + 2].tolist()
        data, key = _mapped(self.files[number]), self._key(i)
        row: Row = {}
        pictures: list[tuple[list, bytes]] = []
        for ending, at, size in self.members.values[first:last].tolist():
            name = self.endings[ending]
            kind = name.rpartition(".")[2]
            if name == self.image or self.image == "image" and kind in PICTURES:
                pictures.append((_natural(name), data[at : at + size]))
            elif kind in ("json", "jsonl"):
                row |= _object(data[at : at + size], name)
            elif kind in TEXTS:
                row[name] = _text(data[at : at + size], name)
            elif kind in OTHERS:
                row[OTHERS[kind]] = f"{key}.{name}"
        if pictures:
            row.pop("images", None), row.pop("image", None)  # names of what the tar holds
            images = [content for _, content in sorted(pictures, key=lambda found: found[0])]
            row |= {"image": images[0]} if len(images) == 1 else {"images": images}
        return {"id": key} | row

    def place(self, i: int) -> str:
        """The key and the tar of row `i`, if there are several tars."""
        i = range(len(self))[i]
        number = int(self.rows.values[i, 0])
        return f"key {self._key(i)} of {os.path.basename(self.files[number].path)}" if len(self.files) > 1 else ""

    def _key(self, i: int) -> str:
        start, end = self.rows.values[i : i + 2, 2].tolist()
        return bytes(self.keys.values[start:end]).decode("utf-8", "replace")

    def fingerprint(self) -> str:
        """Number of rows and a hash of all headers and of sampled bytes of the tars."""
        return f"{len(self)} rows, sha256 {self.digest}"


def _scan(file: DataFile, endings: list[str], prints: Any) -> dict[str, array.array]:
    """(ending, first byte, size) of the members of every key."""
    found: dict[str, array.array] = {}
    with tarfile.open(file.local, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile keeps them all
            prints.update(f"{member.name} {member.size} {member.mtime}\n".encode("utf-8", "surrogateescape"))
            name = NAME.fullmatch(member.name.removeprefix("./"))
            if member.isdir() or not name or name[1].startswith("__MACOSX/"):
                continue
            if not member.isreg() or member.issparse():
                kind = "a link" if member.issym() or member.islnk() else "not a regular file"
                raise UserError(
                    f"data source {file.path!r}: member {member.name!r} is {kind}; pack the files themselves, "
                    "with `tar --dereference --hard-dereference`"
                )
            key, ending = name.groups()
            ending = ending.lower()
            if ending not in endings:
                endings.append(ending)
            number, parts = endings.index(ending), found.setdefault(key, array.array("q"))
            if number in parts[::3]:
                raise UserError(f"data source {file.path!r}: two members are named {member.name!r}; expected one")
            parts.extend((number, member.offset_data, member.size))
        end = archive.offset
    with open(file.local, "rb") as plain:
        plain.seek(end)
        mark = plain.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end marker")
        if any(mark):
            raise tarfile.ReadError(f"the header at byte {end:,} is not valid")
        while block := plain.read(1 << 20):
            if block.count(0) < len(block):
                raise UserError(
                    f"data source {file.path!r} continues after its end marker: it is damaged, or tars were joined with `cat`; "
                    "name a folder with the tars, or join them with `tar --concatenate`"
                )
    return found


@functools.lru_cache(maxsize=OPEN)
def _mapped(file: DataFile) -> mmap.mmap:
    return file.mapped()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts "2.jpg" before "10.jpg"."""
    return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"([0-9]+)", name)]


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("text", f"member .{name} is not UTF-8: {error}") from None


def _object(content: bytes, name: str) -> Row:
    """A .json member: an object, or a list of turns."""
    try:
        value = json.loads(_text(content, name))
    except (ValueError, RecursionError) as error:
        raise BadSample("text", f"member .{name} is not valid JSON: {error}") from None
    if isinstance(value, list):
        return {"conversations": value}
    if not isinstance(value, dict):
        raise BadSample("format", f"member .{name}: expected an object, got {type(value).__name__}")
    return value
