"""Computes what `config.data.cache_features` stores: the outputs of a frozen tower for all pictures of a run, once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsecut_jax.data.features import Features, Picture, Stored, digest_of, pictures_of, stored_of
from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.data.walk import FEW
from sparsecut_jax.models import ways
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.models.sparsecut import SparseCut, normalised
from sparsecut_jax.models.vit import VisionTower
from sparsecut_jax.runs.setup import Data
from sparsecut_jax.runtime import hosts, placing, sharding
from sparsecut_jax.runtime.progress import Progress, busy
from sparsecut_jax.settings import Config
from sparsecut_jax.types import BadSample, UserError

BLOCKS = "blocks/"  # parameters with an axis of blocks


def check_frozen(cfg: Config, paths: list[str]) -> None:
    """Raises UserError if a stage of the run trains the tower. paths: of all parameters."""
    tower = [path for path in paths if path.startswith("vision/")]
    for name in cfg.run_stages:
        for pattern in cfg.stages[name].trainable:
            if any(re.fullmatch(pattern, path) for path in tower):
                raise UserError(
                    f"config.data.cache_features={cfg.data.cache_features!r} needs a frozen tower, but "
                    f"config.stages.{name}.trainable has {pattern!r}, which trains it; take that out or set "
                    "config.data.cache_features=none"
                )


def with_features(data: Data, model: SparseCut, tower: Any) -> Data:
    """The same data, with stored features in place of pictures; those that are missing are computed and stored first.

    In a multi-process run, each process writes a part of the shards; all must see the same folder.

    Args:
      tower: parameters of the tower, on the devices.

    Raises:
      UserError: no room on the disk, or a value that float16 cannot hold.
    """
    cfg, source = data.config, data.source
    parts = [*source.train.values(), *source.holdout.values(), *(source.tests.values() if cfg.eval.test else ())]
    many = sum(map(len, parts)) > FEW
    with busy("listing the pictures of all rows", sys.stdout) if many else contextlib.nullcontext():
        pictures = pictures_of(parts)
        weights = jax.tree.map(placing.fetch, tower)
        digests = tower_digests(weights, ways.wiring_of(cfg).levels)
        stored = stored_of(cfg, digests, len(pictures), digest_of(pictures, source.fingerprint))
    missing = [s for s in stored if not all(os.path.exists(path) for path, _ in s.shards())]
    if placing.gather(np.array(len(missing))).any():  # all have looked before anybody writes
        if missing:
            _store(missing, cfg, model, weights, list(pictures.values()), data.pictures)
        placing.gather(np.array(0))  # all have written
    size = sum(s.bytes for s in stored) / 2**30
    folder = os.path.dirname(stored[0].folder)
    what = f"{len(pictures):,} pictures, blocks {', '.join(map(str, digests))} in {cfg.data.cache_features}"
    print(f"features   {what}: {size:.2f} GiB in {folder}", flush=True)
    numbers = {key: number for number, key in enumerate(pictures)}
    return dataclasses.replace(data, pictures=Features(cfg, data.pictures, numbers, stored))


def tower_digests(weights: Any, levels: tuple[int, ...]) -> dict[int, str]:
    """{level: digest of all weights that its output depends on}"""
    flat = sorted(flatten(weights).items())
    own = _digest((path, array) for path, array in flat if not path.startswith(BLOCKS))
    stacks = [(path, array) for path, array in flat if path.startswith(BLOCKS)]
    of_block = [_digest((path, array[block]) for path, array in stacks) for block in range(max(levels) + 1)]
    return {level: " ".join([own, *of_block[: level + 1]]) for level in dict.fromkeys(levels)}


def _digest(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Of arrays and their paths."""
    digest = hashlib.sha256()
    for path, array in arrays:
        digest.update(f"{path} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _store(
    missing: list[Stored], cfg: Config, model: SparseCut, weights: Any, pictures: list[Picture], images: Images
) -> None:
    """Writes this process's share of the shards of `missing`, at least one level."""
    _check_room(missing)
    encode = Encoder(cfg, model, weights, sorted({s.level for s in missing}))
    shards = [(index, where) for index, (_, where) in enumerate(missing[0].shards())]
    mine = shards[hosts.index() :: jax.process_count()]
    progress = Progress(sum(len(where) for _, where in mine), 0, "storing features of pictures")
    with concurrent.futures.ThreadPoolExecutor(cfg.data.threads) as pool:
        for index, where in mine:
            with contextlib.ExitStack() as finishing:
                files = [finishing.enter_context(_written(s, index, len(where))) for s in missing]
                read = functools.partial(_views, images)
                batches = batched(pool.map(read, [pictures[i] for i in where]), encode.at_once)
                at = 0
                for views in batches:
                    there = np.array([view is not None for view in views])
                    pixels = np.stack([np.zeros(images.shape, np.uint8) if view is None else view for view in views])
                    outputs = encode(pixels)
                    for s, file in zip(missing, files, strict=True):
                        values = np.where(there[:, None, None, None], outputs[s.level][:, s.views], 0)
                        file[at : at + len(views)] = converted(values, s)
                    at += len(views)
                    progress.update(len(views))
    progress.close()


def _check_room(missing: list[Stored]) -> None:
    """Raises UserError if the disk has no room for what is missing."""
    folder = os.path.dirname(missing[0].folder)
    os.makedirs(folder, exist_ok=True)
    needed, free = sum(s.bytes for s in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the features of config.data.cache_features need {needed / 2**30:.1f} GiB in {folder}, which has "
            f"{free / 2**30:.1f} GiB left; set config.data.features_dir to a larger disk"
            + (", or config.data.cache_features=float16" if missing[0].dtype == "float32" else "")
        )


@contextlib.contextmanager
def _written(stored: Stored, index: int, count: int) -> Iterator[np.ndarray]:
    """A new shard, which appears under its name when the block ends without an error."""
    os.makedirs(stored.folder, exist_ok=True)
    path = os.path.join(stored.folder, f"{index:05}.npy")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        file = np.lib.format.open_memmap(temporary, "w+", np.dtype(stored.dtype), (count, *stored.shape))
        yield file
        file.flush()
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _views(images: Images, picture: Picture) -> np.ndarray | None:
    try:
        return images.read(picture.part, picture.entry)
    except BadSample:
        return None


def batched(items: Iterator, size: int) -> Iterator[list]:
    """The items in lists of `size`, of which the last may be shorter."""
    while some := list(itertools.islice(items, size)):
        yield some


def converted(values: np.ndarray, stored: Stored) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = values.astype(stored.dtype)
    if not np.isfinite(result).all():
        raise UserError(
            f"block {stored.level} of the tower has values that {stored.dtype} cannot hold (the largest is "
            f"{np.abs(values).max():.4g}); "
            + ("set config.data.cache_features=float32" if stored.dtype == "float16" else "check its weights")
        )
    return result


class Encoder:
    """Function from pixels uint8[n, V, S, S, 3] to {level: float32[n, V, N, C]}, on the devices of this process."""

    def __init__(self, cfg: Config, model: SparseCut, weights: Any, levels: list[int]):
        self.levels = levels
        self.mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
        # As many as a device encodes in a training step: then a CPU rounds alike, and training on features is bit-equal.
        stage = cfg.stages[cfg.run_stages[-1]]
        rows = stage.batch_size // stage.accumulate // sharding.data_parallel()
        self.at_once = max(1, rows) * (stage.slots or cfg.data.max_images) * self.mesh.size
        depth = max(levels) + 1
        weights = {**weights, "blocks": jax.tree.map(lambda x: x[:depth], weights["blocks"])}
        self.weights = jax.device_put(weights, sharding.replicated(self.mesh))
        tower = VisionTower(cfg.vision, tuple(levels), model.attention)

        def outputs(weights: Any, pixels: jax.Array) -> jax.Array:
            n, v, *shape = pixels.shape
            x = normalised(pixels, cfg.vision, model.dtype).reshape(n * v, *shape)
            x = tower.apply({"params": weights}, x)
            return x.reshape(len(levels), n, v, *x.shape[2:]).astype(jnp.float32)

        self.outputs = jax.jit(outputs)

    def __call__(self, pixels: np.ndarray) -> dict[int, np.ndarray]:
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(placing.filled(pixels, self.at_once), sharding.batch_sharding(self.mesh))
            values = np.asarray(self.outputs(self.weights, placed))[:, : len(pixels)]
        return dict(zip(self.levels, values, strict=True))
