"""Rows of any source with their images (Part), and several such parts as one sequence (Split)."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsecut_jax.data import images
from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.data.image_names import resolve
from sparsecut_jax.data.rows import Row, Subset, place
from sparsecut_jax.data.scratch import MappedArray
from sparsecut_jax.text.conversation import images_of
from sparsecut_jax.types import BadSample

PLAIN_NAME = re.compile(r"[\w-]+(?:[/.][\w-]+)*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Folder:
    """Pictures in a folder of files.

    setting: the setting that names the folder, for messages. follow_links: whether links may lead out of the folder.
    """

    path: str
    max_pixels: int
    setting: str = ""
    follow_links: bool = False

    def inside(self, name: str) -> None:
        if not self.path:
            raise BadSample("missing_image", f"it has an image, but {self.setting}, the folder of the images, is empty")
        if not PLAIN_NAME.fullmatch(name):  # most names are plain and need no further check
            resolve(self.path, name, stat=False)

    def there(self, name: str) -> Path:
        return resolve(self.path, name, follow_links=self.follow_links)

    def open(self, name: str | bytes) -> Image.Image:
        return images.read_image(name if isinstance(name, bytes) else self.there(name), self.max_pixels)

    def read(self, name: str) -> bytes:
        """The encoded file. Raises BadSample if it cannot be opened as an image."""
        path = self.there(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BadSample("missing_image", f"image {path} does not exist") from None
        images.read_image(data, self.max_pixels, str(path))
        return data


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Rows of one source, and access to their pictures.

    Attributes:
      name: the source's name in messages.
      rows: `rows[i]` is a row in any supported format, read when needed.
      pictures: `pictures.open(entry)` is the picture of an entry of a row, a name or encoded bytes.
      numbers: row numbers in the whole source; None: 0, 1, 2, ...
      weight: how often each row occurs per epoch.
      captions: rows -> caption rows, for rows that are not captions themselves.
    """

    name: str
    rows: Sequence[Row]
    pictures: Any
    max_images: int
    numbers: MappedArray | None = None
    weight: float = 1.0
    captions: Callable[[Sequence[Row]], Sequence[Row]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def number(self, i: int) -> int:
        return i if self.numbers is None else int(self.numbers.values[i])

    def row(self, i: int) -> Row:
        """Row `i` in LLaVA's format. Raises BadSample, which names the row."""
        row = {}
        try:
            row = self.rows[i]
            named = self.label(i, row)
            row = canonical(row, named, self.max_images)
            for entry in images_of(row):
                if isinstance(self.pictures, Folder) and isinstance(entry, str):
                    self.pictures.inside(entry)
        except BadSample as error:
            if str(error).startswith(self.label(i, row)):
                raise
            raise BadSample(error.cause, f"{self.label(i, row)}: {error}") from None
        return row

    def label(self, i: int, row: Any) -> str:
        """The name of row `i` in error messages."""
        name = f" (id {row['id']!r:.100})" if isinstance(row, dict) and row.get("id") is not None else ""
        where = place(self.rows, i)
        return f"{self.name} row {self.number(i)}{where and f', {where}'}{name}"

    def look(self, entry: str | bytes, decode: bool) -> None:
        """Raises BadSample if a picture does not exist or, with `decode`, cannot be decoded."""
        if decode:
            self.pictures.open(entry)
        elif isinstance(self.pictures, Folder) and isinstance(entry, str):
            self.pictures.there(entry)

    def encoded(self, entry: str | bytes) -> bytes:
        """The encoded image file; a PNG of a generated picture. Raises BadSample if it cannot be opened."""
        if isinstance(entry, bytes):
            self.pictures.open(entry)
            return entry
        if isinstance(self.pictures, Folder):
            return self.pictures.read(entry)
        file = io.BytesIO()
        self.pictures.open(entry).save(file, "PNG")
        return file.getvalue()

    def take(self, numbers: np.ndarray) -> Part:
        """The part with only the rows `numbers`."""
        rows = Subset(self.rows, numbers)
        return dataclasses.replace(self, rows=rows, numbers=rows.numbers)

    def as_captions(self) -> Part:
        if not self.captions:
            return self
        rows = self.captions(self.rows)
        numbers = self.numbers if len(rows) == len(self) else None  # otherwise captions would be numbered
        return dataclasses.replace(self, rows=rows, numbers=numbers, captions=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Rows of several sources, numbered consecutively."""

    parts: tuple[Part, ...]

    @functools.cached_property
    def ends(self) -> list[int]:
        return list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.parts else 0

    def find(self, i: int) -> tuple[Part, int]:
        """The part of row `i`, and its number there."""
        which = bisect.bisect_right(self.ends, i)
        return self.parts[which], i - (self.ends[which] - len(self.parts[which]))

    def groups(self, usable: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """For every part, which of the rows `usable` belong to it, and its weight."""
        cuts = np.searchsorted(usable, [0, *self.ends])
        return [(usable[a:b], part.weight) for (a, b), part in zip(itertools.pairwise(cuts), self.parts, strict=True)]
