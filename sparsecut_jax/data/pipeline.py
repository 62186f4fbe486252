"""Reads rows and makes batches. A batch is identified by its number in the stage's plan, so a run resumes at any step
without iterator state; hosts, worker processes and threads change who reads, never what is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

from sparsecut_jax.data import images
from sparsecut_jax.data.batch_plan import BatchPlan
from sparsecut_jax.data.batches import Rows, collate, image_shape
from sparsecut_jax.data.parts import Part, Split
from sparsecut_jax.data.rows import Row
from sparsecut_jax.data.walk import Bad, RowEncoder, as_bad, end_with_parent
from sparsecut_jax.models import ways
from sparsecut_jax.settings import Config
from sparsecut_jax.text.conversation import Example, images_of
from sparsecut_jax.types import BadSample, Batch, Extra, UserError, batch_spec

CACHE_BYTES = 256 << 20  # of decoded images, per process
READY = 2  # batches read ahead onto the device


class Images:
    """Reads pictures as uint8[V, S, S, 3]; caches as many as fit into CACHE_BYTES."""

    def __init__(self, cfg: Config):
        self.size, self.fit = cfg.vision.image_size, cfg.data.image_fit
        self.cut = cfg.data.view_size or self.size
        self.border = images.border_colour(cfg.vision.mean)
        self.shape, self.dtype = image_shape(cfg), "uint8"
        self.grid = ways.wiring_of(cfg).grid
        self.forget = False  # True disables the cache, to measure reading
        self._remember()

    def _remember(self) -> None:
        self._cached = functools.lru_cache(maxsize=CACHE_BYTES // math.prod(self.shape))(self._read)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_cached"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def read(self, part: Part, entry: str | bytes) -> np.ndarray:
        """Views of a picture of a row, uint8[V, S, S, 3]. Raises BadSample if it cannot be read."""
        return self._read(part, entry) if self.forget or isinstance(entry, bytes) else self._cached(part, entry)

    def _read(self, part: Part, entry: str | bytes) -> np.ndarray:
        return self.views(part.pictures.open(entry))

    def views(self, picture: Any) -> np.ndarray:
        return images.enlarged(images.views(picture, self.cut, self.grid, self.fit, self.border), self.size)


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads rows of a split as sequences.

    Attributes:
      split: the rows.
      encode: tokenises a row.
      pictures: reads its images.
      flip, shift: augmentation of training images.
      extras: {name: what else is read}
    """

    split: Split
    encode: RowEncoder
    pictures: Images
    flip: bool = False
    shift: int = 0
    extras: Mapping[str, Extra] = dataclasses.field(default_factory=dict)

    def example(
        self, part: Part, row: Row, rng: np.random.Generator | None, number: int
    ) -> tuple[Example, list[np.ndarray]]:
        """Row `number` of the split and its pictures. rng shuffles independent turns and augments images; None does neither.

        Raises:
          BadSample: the row does not fit, or a picture cannot be read.
        """
        order, turns = None, len(row["conversations"]) // 2
        if rng is not None:
            order = rng.permutation(turns)
        elif self.encode.question:  # one turn is taken: not the first of every row, which may be of one kind
            order = np.roll(np.arange(turns), -number)
        example = self.encode(row, order)
        pictures = [self.pictures.read(part, entry) for entry in images_of(row)[: len(example.image_start)]]
        if rng is not None and (self.flip or self.shift):
            pictures = [images.augment(views, rng, self.flip, self.shift, self.pictures.grid) for views in pictures]
        return example, pictures

    @property
    def spec(self) -> dict[str, Any]:
        """Images and extras, as `batch_spec` takes them."""
        return {"image_shape": self.pictures.shape, "image_dtype": self.pictures.dtype, "extras": self.extras}

    def branched(self) -> bool:
        """Whether any row has independent questions."""
        for i in range(len(self.split)):
            part, local = self.split.find(i)
            with contextlib.suppress(BadSample):
                if self.encode.length(part.row(local))[2]:
                    return True
        return False

    def sequence(self, rows: list[int], rng: np.random.Generator | None) -> tuple[Rows, list[Bad]]:
        """The rows that can be read as one sequence, and the bad ones."""
        sequence, bad = [], []
        for i in rows:
            part, local = self.split.find(i)
            row = {}
            try:
                row = part.row(local)
                sequence.append(self.example(part, row, rng, i))
            except BadSample as error:
                bad.append(as_bad(part, local, row, error))
        return sequence, bad


@dataclasses.dataclass(frozen=True, eq=False)
class BatchReader:
    """Function from the number of a batch in the plan to this process's rows of it, and the bad rows among them.

    The random numbers of a sequence are derived from its place in the plan, so they are the same whoever reads it.

    Attributes:
      reader, plan, seed: the rows, the batch plan, and the seed of shuffling and augmentation.
      here: int64[n], indices within a batch of the sequences to read.
    """

    reader: Reader
    plan: BatchPlan
    seed: tuple[int, ...]
    here: np.ndarray

    def __call__(self, batch: int) -> tuple[Batch, list[Bad]]:
        sequences, bad = [], []
        for i in self.here.tolist():
            rng = np.random.default_rng([*self.seed, batch, i])
            sequence, broken = self.reader.sequence(self.plan.sequence(batch, i), rng)
            sequences.append(sequence)
            bad += broken
        return collate(sequences, self.plan.spec(batch, len(sequences), **self.reader.spec)), bad


def train_batches(
    reader: Reader,
    plan: BatchPlan,
    cfg: Config,
    seed: tuple[int, ...],
    first: int = 0,
    here: np.ndarray | None = None,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> grain.DatasetIterator:
    """Iterator of (Batch, bad rows) from batch `first` of the plan on.

    Args:
      reader, plan: the rows and the batch plan.
      cfg: with data.threads and data.workers.
      seed: of shuffled turns and augmentation.
      first: number of the first batch.
      here: int64[n], indices within a batch of the sequences to read; None: all.
      place: moves a batch to the devices; called ahead of time, for READY batches.
    """
    read = BatchReader(reader, plan, seed, np.arange(plan.batch_size) if here is None else here)
    numbers = grain.MapDataset.range(first, len(plan))
    options = grain.ReadOptions(num_threads=cfg.data.threads, prefetch_buffer_size=2 * cfg.data.threads)
    batches = numbers.map(read).to_iter_dataset(options)
    if cfg.data.workers:
        processes = grain.MultiprocessingOptions(cfg.data.workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(processes, worker_init_fn=_serve)
        # Copies the arrays, so that memory shared with a worker is freed at once and not after the step.
        batches = batches.map(
            functools.partial(jax.tree.map, lambda x: np.array(x) if isinstance(x, np.ndarray) else x)
        )
    placed = batches.map(lambda read: (place(read[0]), read[1]))
    return iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=READY))


def next_batch(batches: Iterator[tuple[Batch, list[Bad]]]) -> tuple[Batch, list[Bad]]:
    """The next batch. Raises UserError if a data worker died."""
    try:
        return next(batches)
    except RuntimeError as error:
        code = re.search(r"exit code (-?\d+)", str(error))
        if not code:
            raise
        raise UserError(
            f"a data worker ended with exit code {code[1]} (-9: killed, often out of memory); lower config.data.workers, "
            "then run the same command to resume from the last checkpoint"
        ) from error


@contextlib.contextmanager
def closing(batches: grain.DatasetIterator) -> Iterator[None]:
    """Ends the processes and threads that read `batches` when the block ends."""
    try:
        yield
    finally:
        batches.close()
        gc.collect()  # Grain's iterators form reference cycles that hold memory shared with ended processes


def _serve(*_: int) -> None:
    """Makes a data worker ignore SIGTERM and end with the process that started it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def fixed_batches(
    reader: Reader, size: int, seq_len: int, slots: int, here: np.ndarray | None = None
) -> Iterator[Batch]:
    """Batches of all rows, once and in order; broken rows, and those that fill the last batch, are empty sequences.

    here: int64[n], indices within a batch of the rows to read; None: all.
    """
    count = len(reader.split)
    own = size if here is None else len(here)
    spec = batch_spec(own, seq_len, slots, **reader.spec, branched=reader.branched(), most_segments=1)
    for first in range(0, count, size):
        numbers = (first + (np.arange(size) if here is None else here)).tolist()
        yield collate([reader.sequence([i] if i < count else [], None)[0] for i in numbers], spec)
