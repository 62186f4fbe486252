"""Rows in, Batch out: a Grain dataset that is shuffled per epoch, split by process, and resumable by index."""

from __future__ import annotations

import functools
import math
from typing import Any

import grain
import numpy as np

from sparsecut_jax.data import images
from sparsecut_jax.data.conversation import TEMPLATES, Example, TooLong, encode_row, images_of
from sparsecut_jax.data.sources import Split
from sparsecut_jax.data.tokenizer import Tokenizer
from sparsecut_jax.models.fusion import FUSIONS
from sparsecut_jax.settings import Config, StageConfig
from sparsecut_jax.types import EMPTY_SLOT, Batch, UserError

CACHE_BYTES = 256 << 20  # of decoded images, per process


class Images:
    """Reads an image as uint8[V, S, S, 3], and remembers as many as fit into CACHE_BYTES."""

    def __init__(self, cfg: Config):
        size, count = cfg.vision.image_size, FUSIONS[cfg.fusion.name].views
        self.shape = (count, size, size, 3)

        def read(folder: str, name: str) -> np.ndarray:
            image = images.read_image(images.resolve(folder, name), cfg.data.max_pixels)
            return images.views(image, size, count, cfg.data.image_fit)

        self.read = functools.lru_cache(maxsize=CACHE_BYTES // math.prod(self.shape))(read)


def collate(examples: list[tuple[Example, list[np.ndarray]]], seq_len: int, slots: int, image_shape: tuple) -> Batch:
    """Examples and their images -> one Batch of numpy arrays, padded on the right to `seq_len`."""
    b = len(examples)
    columns = {name: np.zeros((b, seq_len), np.int32) for name in ("tokens", "segments", "branches", "positions")}
    loss_mask = np.zeros((b, seq_len), np.uint8)
    views = np.zeros((b, slots, *image_shape), np.uint8)
    image_start = np.full((b, slots), EMPTY_SLOT, np.int32)
    for row, (example, pictures) in enumerate(examples):
        n = len(example.tokens)
        columns["tokens"][row, :n] = example.tokens
        columns["branches"][row, :n] = example.branches
        columns["positions"][row, :n] = example.positions
        columns["segments"][row, :n] = 1
        loss_mask[row, :n] = example.loss_mask
        for m, (start, picture) in enumerate(zip(example.image_start, pictures, strict=True)):
            image_start[row, m], views[row, m] = start, picture
    return Batch(loss_mask=loss_mask, views=views, image_start=image_start, **columns)


def encoder(split: Split, stage: StageConfig, cfg: Config, tokenizer: Tokenizer, pictures: Images):
    """Function (row, numpy Generator or None) -> (Example, its images).

    The generator shuffles independent turns and augments the images; None does neither.
    """
    template = TEMPLATES[stage.template]

    def encode(row: dict[str, Any], rng: np.random.Generator | None) -> tuple[Example, list[np.ndarray]]:
        order = rng.permutation(len(row["conversations"]) // 2) if rng is not None else None
        example = encode_row(row, tokenizer, template, cfg.tokens_per_image, stage.seq_len, order)
        names = images_of(row)[: len(example.image_start)]
        found = [pictures.read(split.images, name) for name in names]
        if rng is not None and (cfg.data.flip or cfg.data.shift):
            found = [images.augment(picture, rng, cfg.data.flip, cfg.data.shift) for picture in found]
        return example, found

    return encode


def fitting(rows: list, stage: StageConfig, cfg: Config, tokenizer: Tokenizer) -> tuple[list, list[str]]:
    """The rows that fit into the stage's seq_len, and a sentence for each that does not."""
    kept, dropped = [], []
    for row in rows:
        try:
            encode_row(row, tokenizer, TEMPLATES[stage.template], cfg.tokens_per_image, stage.seq_len)
            kept.append(row)
        except TooLong as error:
            dropped.append(str(error))
    return kept, dropped


def train_batches(
    split: Split,
    stage: StageConfig,
    cfg: Config,
    tokenizer: Tokenizer,
    pictures: Images,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless iterator of this process's rows of each Batch, in an order that only seed and epoch decide.

    `get_state` and `set_state` (or Grain's Orbax handler) take it up at any batch. Reading threads
    change the speed, not the order.
    """
    if stage.batch_size % process_count:
        raise UserError(f"batch_size={stage.batch_size} cannot be split over {process_count} processes")
    encode = encoder(split, stage, cfg, tokenizer, pictures)
    rows = grain.MapDataset.source(split.rows).seed(cfg.seed).shuffle().repeat().random_map(encode)
    rows = rows[process_index::process_count]
    put_together = functools.partial(
        collate, seq_len=stage.seq_len, slots=cfg.data.max_images, image_shape=pictures.shape
    )
    batches = rows.batch(stage.batch_size // process_count, batch_fn=put_together)
    options = grain.ReadOptions(num_threads=cfg.data.threads, prefetch_buffer_size=2 * cfg.data.threads)
    return iter(batches.to_iter_dataset(options))


def fixed_batches(split: Split, stage: StageConfig, cfg: Config, tokenizer: Tokenizer, pictures: Images) -> list[Batch]:
    """All rows of a split once, in order; the last batch is filled up with empty rows, which count for nothing."""
    encode = encoder(split, stage, cfg, tokenizer, pictures)
    empty = Example(*(np.zeros(0, np.int32),) * 4, image_start=[])
    found = [encode(row, None) for row in split.rows]
    size = stage.batch_size // stage.accumulate
    found += [(empty, [])] * (-len(found) % size)
    return [
        collate(found[i : i + size], stage.seq_len, cfg.data.max_images, pictures.shape)
        for i in range(0, len(found), size)
    ]
