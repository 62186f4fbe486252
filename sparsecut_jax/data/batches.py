"""Batches for a config: their shapes, and how examples and pictures fill them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsecut_jax.models import ways
from sparsecut_jax.settings import Config
from sparsecut_jax.text.conversation import Example
from sparsecut_jax.types import Batch, batch_spec, empty_batch

Sequence = list[tuple[Example, list[np.ndarray]]]  # the examples of one sequence, each with its images


def image_shape(cfg: Config) -> tuple[int, int, int, int]:
    """(V, S, S, 3), the shape of an image."""
    return ways.views(cfg), cfg.vision.image_size, cfg.vision.image_size, 3


def spec_of(cfg: Config, rows: int, length: int, slots: int, **more: Any) -> Batch:
    """`batch_spec` of a config's images; `more`: its other arguments."""
    return batch_spec(rows, length, slots, image_shape(cfg), question=ways.wiring_of(cfg).question, **more)


def collate(sequences: list[Sequence], spec: Batch) -> Batch:
    """One batch of numpy arrays; the examples of a sequence become segments 1, 2, ..., followed by padding."""
    batch = empty_batch(spec)
    for row, sequence in enumerate(sequences):
        at, slot = 0, 0
        for segment, (example, pictures) in enumerate(sequence, start=1):
            where = slice(at, at + len(example.tokens))
            batch.tokens[row, where] = example.tokens
            batch.loss_mask[row, where] = example.loss_mask
            batch.segments[row, where] = segment
            batch.positions[row, where] = example.positions
            if batch.branches is not None:
                batch.branches[row, where] = example.branches
            for i, (start, picture) in enumerate(zip(example.image_start, pictures, strict=True)):
                batch.image_start[row, slot], batch.views[row, slot] = at + start, picture
                if "question" in batch.extras:
                    ids = example.questions[i]
                    batch.extras["question"][row, slot, : len(ids)] = ids
                slot += 1
            at = where.stop
    return batch
