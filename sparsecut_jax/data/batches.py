"""Batches for a config: their shapes, and how examples and pictures fill them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsecut_jax.models import levels, ways
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks import registry
from sparsecut_jax.text.conversation import Example
from sparsecut_jax.types import Batch, batch_spec, empty_batch

Rows = list[tuple[Example, list[np.ndarray]]]  # the examples of one sequence, each with its images


def image_shape(cfg: Config) -> tuple[int, int, int, int]:
    """(V, S, S, 3), the shape of an image as pixels."""
    return ways.views(cfg), cfg.vision.image_size, cfg.vision.image_size, 3


def image_of(cfg: Config) -> dict[str, Any]:
    """Shape and dtype of an image in the batches of training, as `batch_spec` takes them: pixels, or stored features."""
    if cfg.data.cache_features == "none":
        return {"image_shape": image_shape(cfg)}
    channels = len(set(ways.wiring_of(cfg).levels)) * cfg.vision.width
    return {
        "image_shape": (ways.views(cfg), levels.patches(cfg), channels),
        "image_dtype": cfg.data.cache_features,
    }


def slots_of(cfg: Config, name: str) -> int:
    """Image slots of a sequence of stage `name` (M)."""
    return cfg.stages[name].slots or cfg.data.max_images


def spec_of(cfg: Config, rows: int, length: int, slots: int, **more: Any) -> Batch:
    """`batch_spec` of a config's images; `more`: its other arguments."""
    return batch_spec(rows, length, slots, extras=registry.extras_of(cfg), **image_of(cfg), **more)


def collate(sequences: list[Rows], spec: Batch) -> Batch:
    """One batch of numpy arrays; the examples of a sequence become segments 1, 2, ..., followed by padding."""
    batch = empty_batch(spec)
    for row, sequence in enumerate(sequences):
        at, slot, items = 0, 0, dict.fromkeys(batch.extras, 0)
        for segment, (example, pictures) in enumerate(sequence, start=1):
            where = slice(at, at + len(example.tokens))
            batch.tokens[row, where] = example.tokens
            batch.loss_mask[row, where] = example.loss_mask
            batch.segments[row, where] = segment
            batch.positions[row, where] = example.positions
            if batch.branches is not None:
                batch.branches[row, where] = example.branches
            for start, picture in zip(example.image_start, pictures, strict=True):
                batch.image_start[row, slot], batch.views[row, slot] = at + start, picture
                slot += 1
            for name, array in batch.extras.items():
                added = example.extras.get(name, ())
                write_items(array[row, items[name] :], added)
                items[name] += len(added)
            at = where.stop
    return batch


def write_items(array: np.ndarray, items: Sequence[np.ndarray]) -> None:
    """Writes items into the first places of `array`, [P, ...], each into the first corner of its place.

    Raises ValueError if there are more than P, or one is larger than its place.
    """
    if len(items) > len(array):
        raise ValueError(f"{len(items)} items for {len(array)} places")
    for place, item in enumerate(items):
        array[(place, *map(slice, np.shape(item)))] = item
