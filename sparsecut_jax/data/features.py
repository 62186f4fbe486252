"""Stored outputs of a frozen tower, which training reads in place of pixels (`config.data.cache_features`).

A folder of features has a subfolder for each level of the tower and each kind of view, low-res or crops, so that ways of
fusing that read other levels share what they have in common. Its name is a hash of all that its numbers depend on: the tower
up to that block, how views are cut, the pictures, and the dtype. In it, shard k holds the pictures from k * SHARD on, as one
.npy file [pictures, views, N, C] that is renamed when it is complete and then only mapped into memory.

Pictures are numbered in the order in which training rows, held-out rows and test rows name them. Zeros stand for a picture
that cannot be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator

import numpy as np

from sparsecut_jax.data.batches import image_of
from sparsecut_jax.data.parts import Folder, Part
from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.models import levels, ways
from sparsecut_jax.settings import Config
from sparsecut_jax.text.conversation import images_of
from sparsecut_jax.types import BadSample

SHARD = 4096  # pictures of a file
OPEN = 256  # files that a process keeps mapped
LOW, CROPS = "low", "crops"
Key = str | bytes  # of a picture: where it is, or the digest of its bytes


def key_of(part: Part, entry: str | bytes) -> Key:
    """Identifies a picture of a part among those of all parts."""
    if isinstance(entry, bytes):
        return hashlib.sha256(entry).digest()
    return os.path.join(part.pictures.path if isinstance(part.pictures, Folder) else part.name, entry)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture, by the first row that has it: number `place` of row `row` of `part`. name: "" if it is bytes, which the row holds."""

    part: Part
    row: int
    place: int
    name: str

    @property
    def entry(self) -> str | bytes:
        return self.name or images_of(self.part.row(self.row))[self.place]


def pictures_of(parts: Iterable[Part]) -> dict[Key, Picture]:
    """All pictures, in the order of the rows."""
    found: dict[Key, Picture] = {}
    for part in parts:
        for i in range(len(part)):
            with contextlib.suppress(BadSample):
                for place, entry in enumerate(images_of(part.row(i))):
                    name = entry if isinstance(entry, str) else ""
                    found.setdefault(key_of(part, entry), Picture(part, i, place, name))
    return found


def digest_of(pictures: dict[Key, Picture], fingerprint: str) -> str:
    """Of the pictures: their order, the size and time of each file, and the fingerprint of a source without files."""
    digest = hashlib.sha256(fingerprint.encode())
    for key, picture in pictures.items():
        digest.update(key if isinstance(key, bytes) else key.encode())
        if isinstance(picture.part.pictures, Folder) and picture.name:
            with contextlib.suppress(OSError, BadSample):
                stat = os.stat(picture.part.pictures.there(picture.name))
                digest.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
        digest.update(b"\n")
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Stored:
    """One level of all pictures, in the low-res view or in the crops.

    Attributes:
      folder: of its shards.
      level: block of the tower, -1 for the first block's input.
      views: which views of a picture, as a slice of all.
      pictures: how many there are.
      shape: [views, N, C] of a picture; dtype: as stored.
    """

    folder: str
    level: int
    views: slice
    pictures: int
    shape: tuple[int, int, int]
    dtype: str

    def shards(self) -> Iterator[tuple[str, range]]:
        """The path of every shard, and the numbers of its pictures."""
        for first in range(0, self.pictures, SHARD):
            path = os.path.join(self.folder, f"{first // SHARD:05}.npy")
            yield path, range(first, min(first + SHARD, self.pictures))

    @property
    def bytes(self) -> int:
        return self.pictures * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def read(self, number: int) -> np.ndarray:
        """[views, N, C] of a picture."""
        shard, place = divmod(number, SHARD)
        return _mapped(os.path.join(self.folder, f"{shard:05}.npy"))[place]


@functools.lru_cache(maxsize=OPEN)
def _mapped(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def stored_of(cfg: Config, tower: dict[int, str], pictures: int, digest: str) -> list[Stored]:
    """What the config's way of fusing reads: for each of its levels the low-res view, and the crops if it reads any.

    tower: {level: digest of the tower's weights up to there}; digest: of the pictures.
    """
    wiring, v = ways.wiring_of(cfg), cfg.vision
    cut = {"image_size": v.image_size, "view_size": cfg.data.view_size or v.image_size, "fit": cfg.data.image_fit}
    cut |= {"mean": v.mean, "std": v.std, "pictures": digest, "dtype": cfg.data.cache_features}
    shapes = {LOW: (slice(0, 1), 1, {})}
    if wiring.grid:
        shapes[CROPS] = (slice(1, None), ways.view_count(wiring) - 1, {"grid": wiring.grid})
    root = cfg.data.features_dir or os.path.join(cfg.workdir, "features")
    result = []
    for level in dict.fromkeys(wiring.levels):
        for kind, (views, count, more) in shapes.items():
            described = json.dumps({**cut, **more, "tower": tower[level]}, sort_keys=True)
            name = f"block{level}-{kind}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
            shape = (count, levels.patches(cfg), v.width)
            path = os.path.join(root, name)
            result.append(Stored(path, level, views, pictures, shape, cfg.data.cache_features))
    return result


class Features:
    """Reads stored features in place of pixels; see `pipeline.Images`, whose `read`, `shape`, `dtype` and `grid` it has.

    Attributes:
      pixels: reads the pictures themselves.
      numbers: {key of a picture: its number}.
      stored: what is read of each picture.
    """

    def __init__(self, cfg: Config, pixels: Images, numbers: dict[Key, int], stored: list[Stored]):
        self.pixels, self.numbers, self.stored = pixels, numbers, stored
        self.grid = pixels.grid
        self.shape, self.dtype = image_of(cfg)["image_shape"], cfg.data.cache_features

    def read(self, part: Part, entry: str | bytes) -> np.ndarray:
        """Features of a picture of a row, [V, N, K * C]. Raises BadSample if the picture cannot be read."""
        number = self.numbers[key_of(part, entry)]
        kinds = 2 if self.grid else 1
        by_level = [
            np.concatenate([stored.read(number) for stored in self.stored[i : i + kinds]])
            for i in range(0, len(self.stored), kinds)
        ]
        if not by_level[0].any():
            self.pixels.read(part, entry)
            raise BadSample("broken_image", f"image {entry!r:.100} could not be read when its features were stored")
        return np.concatenate(by_level, axis=-1)
