"""One pass over all rows before the first step, which finds their lengths and the bad ones.

It serves training (lengths for the batch plan), `data check` and `data stats`. Many rows are read by several processes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from sparsecut_jax.data.batch_plan import BatchPlan, Lengths, make_plan
from sparsecut_jax.data.parts import Part, Split
from sparsecut_jax.data.rows import Row
from sparsecut_jax.settings import Config, StageConfig
from sparsecut_jax.tasks.registry import Task
from sparsecut_jax.text.conversation import Example, TooLong, alone, encode_row, images_of, with_questions
from sparsecut_jax.text.templates import get_template
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import BadSample, UserError

CHUNK = 500
FEW = 20_000  # up to this many rows, one process is faster than starting others
Look = Literal["none", "stat", "decode"]


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row that cannot be trained on: `row` is its number in its source, `cause` a key of types.CAUSES."""

    source: str
    row: int
    id: str
    cause: str
    reason: str

    @property
    def key(self) -> tuple[str, int]:
        return self.source, self.row


@dataclasses.dataclass(frozen=True)
class RowEncoder:
    """Tokenises the rows of a stage: with a tokenizer, a template, N tokens per image and a maximum length.

    question: tokens of the question about each image that are read (Tq). If there are any, an image is encoded with one
      question, so each epoch takes another one of a row's independent questions.
    task: may encode rows in a way of its own.
    """

    tokenizer: Tokenizer
    template: str
    image_tokens: int
    seq_len: int
    question: int = 0
    task: Task = Task()

    @classmethod
    def of(
        cls, stage: StageConfig, image_tokens: int, tokenizer: Tokenizer, question: int = 0, task: Task = Task()
    ) -> RowEncoder:
        get_template(stage.template, tokenizer)  # refuses a template that the tokenizer does not support
        return cls(tokenizer, stage.template, image_tokens, stage.seq_len, question, task)

    def __call__(self, row: dict, order: np.ndarray | None = None) -> Example:
        """The Example of a row. Raises TooLong if its images and first answer do not fit."""
        return self.task.encode(row, functools.partial(self._conversation, order=order))

    def _conversation(self, row: dict, order: np.ndarray | None) -> Example:
        how = (self.tokenizer, get_template(self.template, self.tokenizer), self.image_tokens, self.seq_len)
        if not self.question:
            return encode_row(row, *how, order)
        rows = alone(row)
        for i in range(len(rows)) if order is None else [i for i in order if i < len(rows)]:
            try:
                return with_questions(encode_row(rows[i], *how), self.tokenizer, self.question)
            except TooLong as error:  # another question may fit
                too_long = error
        raise too_long

    def length(self, row: dict) -> tuple[int, int, bool, int]:
        """Positions and images of a row, whether it has branches, and how many answers never fit; if independent
        questions do not all fit, they may take the whole sequence."""
        example = self(row)
        if self.question:
            lengths = [len(tokens) for tokens in self._tokens_alone(row)]
            return max(lengths), len(example.image_start), False, example.cut + len(alone(row)) - len(lengths)
        positions = len(example.tokens)
        branches = int(example.branches.max())  # 0 if a template has no questions and thus nothing independent
        if row.get("independent") and 0 < branches < sum(turn.get("loss", True) for turn in row["conversations"][1::2]):
            positions = self.seq_len
        return positions, len(example.image_start), branches > 0, example.cut

    def _tokens_alone(self, row: Row) -> Iterator[np.ndarray]:
        """The tokens of a row with each of its independent questions alone, of those that fit."""
        for each in alone(row):
            with contextlib.suppress(TooLong):
                yield self(each).tokens

    def surely_fits(self, row: Row) -> bool:
        """Whether all of a row fits, judged by its number of characters (an upper bound on tokens of plain ASCII), and is
        trained on."""
        if self.task.encodes:
            return False
        turns = row["conversations"]
        said = "".join([turn["value"] for turn in turns]) + row.get("system", "")
        around, image = self._most_around * (len(turns) // 2 + 1), self.image_tokens + 2
        fits = len(said) + around + image * len(images_of(row)) <= self.seq_len and said.isascii()
        return fits and all(turn.get("loss", True) for turn in turns)

    @functools.cached_property
    def _most_around(self) -> int:
        """Upper bound on the template's tokens per question and answer: two extra per text, for prefix tokens."""
        return sum(len(part) + 2 for part in get_template(self.template, self.tokenizer).parts)

    def fingerprint(self) -> str:
        """Identifies everything that lengths depend on."""
        text = f"{self.template} {self.image_tokens} {self.seq_len} {self.tokenizer.to_json()}"
        text += f" {self.question}" if self.question else ""
        text += f" {self.task}" if self.task.encodes else ""
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Stages that read the same rows, combined: a row must fit into all of them."""

    stages: dict[str, RowEncoder]

    def length(self, row: dict) -> tuple[int, int, bool, int]:
        cut = [encoder.length(row)[3] for encoder in self.stages.values() if not encoder.surely_fits(row)]
        return 0, 0, False, max(cut, default=0)  # lengths are not asked for


@dataclasses.dataclass(frozen=True)
class Walked:
    """The result of the pass over the rows of a split.

    Attributes:
      lengths: 0 for a bad row.
      digests: uint64[n], a hash of each row's content; 0 if unasked.
      cut: int32[n], answers of a row that do not fit into seq_len and are never trained on.
    """

    lengths: Lengths
    bad: list[Bad]
    digests: np.ndarray
    cut: np.ndarray

    @property
    def cut_counts(self) -> tuple[int, int]:
        """Answers that are cut, and the rows that lose them."""
        return int(self.cut.sum()), int(np.count_nonzero(self.cut))


def stage_plan(name: str, walked: Walked, split: Split, stage: StageConfig, cfg: Config) -> BatchPlan:
    """The batch plan of stage `name`, over the usable rows. Raises UserError if there are none."""
    usable = walked.lengths.usable
    if not len(usable):
        raise UserError(f"none of the {len(split)} rows of stage {name} can be used: {walked.bad[0].reason}")
    return make_plan(walked.lengths, split.groups(usable), stage, cfg.data.max_images, cfg.seed)


def walk(
    split: Split,
    encoder: RowEncoder,
    look: Look = "none",
    digests: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Walked:
    """Reads, checks and encodes every row.

    Args:
      look: check of the images: "none", "stat" (the files exist) or "decode" (they can be opened).
      progress: called with the number of rows done since the last call.
    """
    count = len(split)
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    state = (split, encoder, look, digests)
    workers = os.cpu_count() or 1
    few = count < (FEW if look != "decode" else 4 * CHUNK)
    tokens, images, cut = (np.zeros(count, np.int32) for _ in range(3))
    hashes, branched, bad = np.zeros(count, np.uint64), np.zeros(count, bool), []

    def take(chunk: range, found: tuple) -> None:
        rows = slice(chunk.start, chunk.stop)
        tokens[rows], images[rows], hashes[rows], branched[rows], cut[rows] = found[:5]
        bad.extend(found[5])
        progress(len(chunk))

    if few or workers == 1:
        for chunk in chunks:
            take(chunk, _walk_chunk(chunk, state))
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start, (state,)) as pool:
            try:
                for chunk, found in zip(chunks, pool.map(_walk_chunk, chunks), strict=True):
                    take(chunk, found)
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(f"a process reading the rows died (out of memory?): {error}") from error
            except BaseException:
                pool.shutdown(cancel_futures=True)  # otherwise all other chunks would be read before stopping
                raise
    return Walked(Lengths(tokens, images, bool(branched.any())), bad, hashes, cut)


_state: tuple | None = None


def _start(state: tuple) -> None:
    global _state
    end_with_parent()
    _state = state


def end_with_parent() -> None:
    """Makes a worker process ignore ^C and end with the process that started it, even if that one is killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


def _walk_chunk(chunk: range, state: tuple | None = None) -> tuple:
    """(tokens, images, hashes, whether branched, answers that are cut, bad rows) of the rows `chunk`."""
    split, encoder, look, digests = state or _state
    tokens, images, cut = (np.zeros(len(chunk), np.int32) for _ in range(3))
    hashes, branched, bad = np.zeros(len(chunk), np.uint64), np.zeros(len(chunk), bool), []
    for k, i in enumerate(chunk):
        part, local = split.find(i)
        row = {}
        try:
            row = part.row(local)
            if digests:
                hashes[k] = _digest(row, getattr(part.pictures, "path", ""))
            for entry in images_of(row) if look != "none" else ():
                part.look(entry, look == "decode")
            tokens[k], images[k], branched[k], cut[k] = encoder.length(row)
        except BadSample as error:
            bad.append(as_bad(part, local, row, error))
    return tokens, images, hashes, branched, cut, bad


def as_bad(part: Part, local: int, row: Row, error: BadSample) -> Bad:
    """row: {} if it could not be read; then the error names it."""
    reason, given = (f"{part.label(local, row)}: {error}", row) if row else (str(error), None)
    with contextlib.suppress(BadSample):
        given = given or part.rows[local]
    name = given.get("id") if isinstance(given, dict) else None
    return Bad(part.name, part.number(local), "" if name is None else str(name), error.cause, reason)


def _digest(row: Row, folder: str) -> int:
    """64-bit hash of a row's images (in `folder`) and texts, equal for duplicate rows."""
    entries = [e if isinstance(e, str) else hashlib.sha256(e).hexdigest() for e in images_of(row)]
    said = [folder * bool(entries), *entries, "", row.get("system", ""), *(t["value"] for t in row["conversations"])]
    text = "\0".join(f"{len(part)} {part}" for part in said)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def walk_once(path: str, split: Split, encoder: RowEncoder, data: str, progress: Callable[[int], None]) -> Walked:
    """The result of `walk`, or that of an earlier start of the run, cached in the file `path`.

    data: fingerprint of the rows.
    """
    read = [
        (part.name, len(part), part.max_images, getattr(part.pictures, "path", ""), part.captions is None)
        for part in split.parts
    ]
    key = f"{data} {read} {encoder.fingerprint()}"
    with contextlib.suppress(Exception), np.load(path) as kept:  # a damaged file raises many kinds of errors
        if str(kept["key"]) == key:
            bad = [Bad(**fields) for fields in json.loads(str(kept["bad"]))]
            lengths = Lengths(kept["tokens"], kept["images"], bool(kept["branched"]))
            return Walked(lengths, bad, np.zeros(0, np.uint64), kept["cut"])
    walked = walk(split, encoder, progress=progress)
    partial = path + ".tmp.npz"
    bad = json.dumps([dataclasses.asdict(bad) for bad in walked.bad])
    lengths = dataclasses.asdict(walked.lengths)
    np.savez(partial, key=key, bad=bad, cut=walked.cut, **lengths)
    os.replace(partial, path)
    return walked
