"""The batch plan: which rows go into which batch, for a whole stage before its first step, from lengths alone.

The plan is a pure function of the rows' lengths, the stage and the seed, so any batch can be computed from its number.
Resuming needs no iterator state and no packing buffer, and every host and worker process sees the same order. A row whose
image turns out to be broken leaves a gap in its sequence and shifts nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsecut_jax.data.scratch import MappedArray
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.types import Batch, UserError, batch_spec

WINDOW = 8192  # shuffled rows among which packing and buckets may choose
TRIES = 64  # sizes tried for the smaller row of a pair
MOST = 2**30  # maximum rows of a plan


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The batches of a stage.

    Attributes:
      rows: int32[total], row numbers, sequence by sequence.
      starts: int64[batches * batch_size + 1], where each sequence begins in `rows`.
      lengths: int32[batches], positions to which the sequences of a batch are padded.
      batch_size: sequences per batch; the last batch may end in empty ones.
      slots: image slots per sequence (M).
      useful: share of non-padding tokens.
      branched: whether any row has independent questions.
    """

    rows: MappedArray
    starts: MappedArray
    lengths: MappedArray
    batch_size: int
    slots: int
    useful: float
    branched: bool

    @property
    def most_segments(self) -> int:
        """Maximum number of rows in a sequence."""
        return int(np.diff(self.starts.values).max())

    def __len__(self) -> int:
        return len(self.lengths.values)

    def spec(self, batch: int, rows: int, **more: Any) -> Batch:
        """The shapes of `rows` sequences of a batch. more: of its images and extras, see `batch_spec`."""
        more |= {"branched": self.branched, "most_segments": self.most_segments}
        return batch_spec(rows, int(self.lengths.values[batch]), self.slots, **more)

    def sequence(self, batch: int, i: int) -> list[int]:
        """Row numbers of sequence `i` of a batch."""
        at = batch * self.batch_size + i
        start, end = self.starts.values[at : at + 2]
        return self.rows.values[start:end].tolist()


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of rows, known before their images are opened.

    Attributes:
      tokens: int32[n], positions of each row, images included; 0 for a row that is skipped.
      images: int32[n], images of each row.
      branched: whether any row has independent questions.
    """

    tokens: np.ndarray
    images: np.ndarray
    branched: bool = False

    @property
    def usable(self) -> np.ndarray:
        """int64[m], numbers of the rows that are not skipped."""
        return np.flatnonzero(self.tokens)


def make_plan(
    lengths: Lengths, groups: list[tuple[np.ndarray, float]], stage: StageConfig, max_images: int, seed: int
) -> BatchPlan:
    """The plan of a stage.

    Args:
      lengths: lengths of all rows.
      groups: for each source, its usable rows and how often each occurs per epoch.
      stage: batching, batch size, sequence length, epochs or max_steps.
      max_images: image slots of a single row.
      seed: of the order.

    Raises:
      UserError: no usable row, less than one row to draw, or more than MOST.
    """
    epoch = sum(len(rows) * weight for rows, weight in groups)
    if not epoch:
        raise UserError("there is no usable row to train on; run data check to see why")
    if epoch < 1:
        raise UserError(
            f"an epoch would draw {epoch:.3g} rows, expected at least 1; raise the weights in config.data.mix"
        )
    drawn = stage.max_steps * stage.batch_size or stage.epochs * epoch
    if round(drawn) < 1:
        raise UserError(f"the stage would draw {drawn:.3g} rows, expected at least 1; raise its epochs")
    if drawn > MOST:
        raise UserError(
            f"the stage would draw {drawn:.3g} rows, expected at most {MOST:,}; lower its epochs or max_steps"
        )
    slots = stage.slots or _slots(lengths, groups, stage, max_images)
    wanted = stage.max_steps * stage.batch_size
    found, batch_lengths, count = [], [], 0
    window_size = max(1, WINDOW // stage.batch_size) * stage.batch_size
    for number, window in enumerate(_windows(groups, np.inf if wanted else stage.epochs, window_size, seed)):
        rng = np.random.default_rng([seed, number, 1])
        if stage.batching == "packed":
            sequences = pack(lengths.tokens[window], lengths.images[window], stage.seq_len, slots)
            rng.shuffle(sequences)
            window = window[np.concatenate(sequences)]
            sizes = np.array([len(rows) for rows in sequences])
        elif stage.batching == "buckets":
            window, padded = _bucket(window, lengths.tokens, stage, rng)
            batch_lengths.append(padded)
            sizes = np.ones(len(window), np.int64)
        else:
            sizes = np.ones(len(window), np.int64)
        found.append((window.astype(np.int32), sizes.astype(np.int32)))
        count += len(sizes)
        if wanted and count >= wanted:
            break
    rows, sizes = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    sizes = sizes[: wanted or None]
    batches = -(-len(sizes) // stage.batch_size)
    sizes = np.append(sizes, np.zeros(batches * stage.batch_size - len(sizes), np.int32))  # fills up the last batch
    rows = rows[: sizes.sum()]
    padded = np.concatenate(batch_lengths)[:batches] if batch_lengths else np.full(batches, stage.seq_len)
    useful = lengths.tokens[rows].sum(dtype=np.int64) / (padded.sum(dtype=np.int64) * stage.batch_size)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    arrays = [MappedArray(array) for array in (rows, starts, padded.astype(np.int32))]
    return BatchPlan(*arrays, stage.batch_size, slots, float(useful), lengths.branched)


def pack(tokens: np.ndarray, images: np.ndarray, seq_len: int, slots: int) -> list[list[int]]:
    """Packs rows into sequences of at most `seq_len` positions and `slots` images.

    Best fit with the longest rows first would leave rows of medium length, of which two do not fill a sequence and three
    do not fit. So every sequence takes as many rows as the remaining ones allow on average: the longest one, some of
    similar length, and the pair that fills the rest best.

    Args:
      tokens, images: int[n], positions and images of each row; each row fits into a sequence alone.
      seq_len, slots: limits of a sequence.

    Returns:
      The row numbers of each sequence, in the order in which they were added.
    """
    shelves = _Shelves(tokens, images)
    positions, count = int(tokens.sum()), len(tokens)
    sequences = []
    while count:
        each = seq_len * count // positions
        members, room, free = [], seq_len, slots
        while True:
            missing = each - len(members)
            if members and missing == 2:
                chosen = shelves.pair(room, free)
            elif members and missing > 2:
                chosen = shelves.largest(room // missing, free)
            else:
                chosen = []
            chosen = chosen or shelves.largest(room, free)
            if not chosen:
                break
            for size, kind in chosen:
                members.append(shelves.take(size, kind))
                room, free = room - size, free - kind
        positions, count = positions - (seq_len - room), count - len(members)
        sequences.append(members)
    return sequences


Kind = tuple[int, int]  # positions and images of a row


class _Shelves:
    """Rows by kind. For every number of images, the set bits of an integer are the available sizes."""

    def __init__(self, tokens: np.ndarray, images: np.ndarray):
        self.rows: dict[Kind, list[int]] = {}
        self.sizes: dict[int, int] = {}
        for i, kind in enumerate(zip(tokens.tolist(), images.tolist(), strict=True)):
            self.rows.setdefault(kind, []).append(i)
            self.sizes[kind[1]] = self.sizes.get(kind[1], 0) | 1 << kind[0]

    def take(self, size: int, images: int) -> int:
        rows = self.rows[size, images]
        if len(rows) == 1:
            self.sizes[images] ^= 1 << size
        return rows.pop()

    def largest(self, room: int, free: int) -> list[Kind]:
        """The kind of the longest row that fits; [] if none does."""
        fits = ((2 << room) - 1) if room > 0 else 0
        there = [((sizes & fits).bit_length() - 1, k) for k, sizes in self.sizes.items() if k <= free]
        size, images = max(there, default=(0, 0))
        return [(size, images)] if size > 0 else []

    def pair(self, room: int, free: int) -> list[Kind]:
        """The kinds of the two rows that fill `room` best, searched in TRIES steps for each number of images."""
        best, filled = [], 0
        for images in self.sizes:
            small = room // 2
            for _ in range(TRIES if images <= free else 0):
                small = (self.sizes[images] & ((2 << small) - 1)).bit_length() - 1
                if small <= 0:
                    break
                row = self.take(small, images)
                other = self.largest(room - small, free - images)
                self.put(row, small, images)
                if other and small + other[0][0] > filled:
                    best, filled = [(small, images), *other], small + other[0][0]
                    if filled == room:
                        return best
                small -= 1
        return best

    def put(self, row: int, size: int, images: int) -> None:
        self.rows[size, images].append(row)
        self.sizes[images] |= 1 << size


def _windows(groups: list[tuple[np.ndarray, float]], epochs: float, size: int, seed: int) -> Iterator[np.ndarray]:
    """int64[size] row numbers in shuffled order, epoch by epoch; the last epoch may be partial."""
    per_epoch = sum(len(rows) * weight for rows, weight in groups)
    left = np.inf if np.isinf(epochs) else round(epochs * per_epoch)
    pending, epoch = np.zeros(0, np.int64), 0
    while left > 0:
        drawn = np.concatenate([_draw(rows, weight, epoch, [seed, g]) for g, (rows, weight) in enumerate(groups)])
        drawn = np.random.default_rng([seed, epoch, 0]).permutation(drawn)
        drawn = drawn[: int(min(left, len(drawn)))]
        left, epoch = left - len(drawn), epoch + 1
        pending = np.concatenate([pending, drawn])
        full = len(pending) // size * size
        yield from np.split(pending[:full], full // size) if full else ()
        pending = pending[full:]
    if len(pending):
        yield pending


def _draw(rows: np.ndarray, weight: float, epoch: int, seed: list[int]) -> np.ndarray:
    """The rows of one source in an epoch: repeated passes over all of them, each in its own order."""
    n = len(rows)
    begin, end = round(epoch * weight * n), round((epoch + 1) * weight * n)
    pieces = [rows[:0]]
    while begin < end:
        number, at = divmod(begin, n)
        stop = min(n, at + end - begin)
        pieces.append(np.random.default_rng([*seed, number, 2]).permutation(rows)[at:stop])
        begin += stop - at
    return np.concatenate(pieces)


def _bucket(
    window: np.ndarray, tokens: np.ndarray, stage: StageConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a window as batches of similar length, in shuffled order, and the padded length of each batch."""
    sizes = np.array(sorted({*(stage.buckets or (stage.seq_len // 4, stage.seq_len // 2)), stage.seq_len}))
    ordered = window[np.argsort(tokens[window], kind="stable")]
    batches = np.split(ordered, np.arange(stage.batch_size, len(ordered), stage.batch_size))
    order = rng.permutation(len(batches) - 1).tolist() + [len(batches) - 1]  # a partial batch must be the last
    rows = np.concatenate([rng.permutation(batches[i]) for i in order])
    return rows, sizes[np.searchsorted(sizes, [tokens[batches[i]].max() for i in order])]


def _slots(lengths: Lengths, groups: list[tuple[np.ndarray, float]], stage: StageConfig, max_images: int) -> int:
    """Image slots per sequence: those of a row; with packing the average of full sequences, rounded up."""
    if stage.batching != "packed":
        return max_images
    tokens = sum(weight * lengths.tokens[rows].sum() for rows, weight in groups)
    images = sum(weight * lengths.images[rows].sum() for rows, weight in groups)
    return max(max_images, int(np.ceil(stage.seq_len * images / tokens)))
