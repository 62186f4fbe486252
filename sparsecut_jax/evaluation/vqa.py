"""Exact-match accuracy by generation: every question asked alone, every image encoded once."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsecut_jax import placing, sharding
from sparsecut_jax.data.conversation import IMAGE, Example, encode_prompt, images_of
from sparsecut_jax.data.parts import Part
from sparsecut_jax.data.templates import get_template, stop_ids
from sparsecut_jax.data.walk import as_bad
from sparsecut_jax.inference.decoding import encode_images, generate, pad_prompts, until
from sparsecut_jax.inference.run import Run
from sparsecut_jax.types import BadSample

IMAGES_AT_ONCE = 64
REASON = 1024  # bytes of a sentence about a broken row that other processes get


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a row: `image` is the row's place among the rows encoded together."""

    row: str
    image: int
    text: str
    answer: str
    kind: str
    prompt: Example


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question, its reference answer and the model's."""

    row: str
    kind: str
    question: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        return self.expected == self.answer


def asked_turns(row: dict[str, Any]) -> list[tuple[dict, dict]]:
    """The (human, gpt) pairs that are asked: all independent turns, the first one of a conversation; none whose answer
    has `"loss": false`."""
    pairs = list(zip(row["conversations"][::2], row["conversations"][1::2], strict=True))
    return [pair for pair in (pairs if row.get("independent") else pairs[:1]) if pair[1].get("loss", True)]


def questions(rows: dict[int, dict[str, Any]], run: Run) -> list[Question]:
    """The prompts of all questions of some rows, each on its own. `rows`: by their places among those encoded together."""
    found, template = [], get_template(run.template, run.tokenizer)
    for i, row in rows.items():
        for human, gpt in asked_turns(row):
            text = human["value"].replace(IMAGE, "").strip()
            shared = row.get("independent")  # images stand before all questions, else where this one has them
            asked, images = (text, len(images_of(row))) if shared else (human["value"], human["value"].count(IMAGE))
            how = (run.tokenizer, template, run.config.tokens_per_image, row.get("system", ""))
            prompt = encode_prompt(asked, images, *how)
            found.append(Question(str(row.get("id", i)), i, text, gpt["value"].strip(), gpt.get("kind", ""), prompt))
    return found


@dataclasses.dataclass(frozen=True)
class Progressed:
    """What came of some rows: the answers to their questions, and a sentence for each row that could not be read."""

    rows: int
    answered: list[Answered]
    broken: list[str]


def answer_part(run: Run, part: Part) -> Iterator[Progressed]:
    """Answers all questions of the rows of a part, greedily, some rows at a time.

    The last short batch is filled up with empty prompts, whose answers are thrown away. Each process opens the pictures
    that its devices encode, and all get all answers.
    """
    cfg, placed = run.config, sharding.batch_sharding(run.mesh)
    stop = stop_ids(run.tokenizer, get_template(run.template, run.tokenizer))
    ways = sharding.data_parallel(run.mesh)
    at_once, size = (-(-n // ways) * ways for n in (IMAGES_AT_ONCE, cfg.eval.batch_size))
    held, asking = placing.rows_here(placed, at_once), placing.rows_here(placed, size)
    places = {int(at): i for i, at in enumerate(held)}  # of rows among those that this process holds
    for start in range(0, len(part), at_once):
        numbers = range(start, min(start + at_once, len(part)))
        rows, reasons = {}, np.zeros((at_once, REASON), np.uint8)
        views = np.zeros((len(held), cfg.data.max_images, *run.pictures.shape), np.uint8)
        for at, number in enumerate(numbers):
            row = {}
            try:
                row = rows[at] = part.row(number)
                if at in places:
                    for m, entry in enumerate(images_of(row)):
                        views[places[at], m] = run.pictures.read(part, entry)
            except BadSample as error:
                reason = as_bad(part, number, row, error).reason.encode()[:REASON]
                reasons[at, : len(reason)] = np.frombuffer(reason, np.uint8)
        reasons = placing.gather(reasons).max(0)  # those who know it say the same
        broken = {at: bytes(reasons[at]).rstrip(b"\0").decode(errors="ignore") for at in reasons.any(1).nonzero()[0]}
        encoded = encode_images(run.model, run.params, placing.place(views, placed, held, at_once))
        asked, answered = questions({at: row for at, row in rows.items() if at not in broken}, run), []
        for first in range(0, len(asked), size):
            batch = asked[first : first + size]
            image = np.zeros(size, np.int32)
            image[: len(batch)] = [q.image for q in batch]
            arrays = pad_prompts([q.prompt for q in batch], size, cfg.data.max_images)
            *arrays, image = placing.place(tuple(x[asking] for x in (*arrays, image)), placed, asking, size)
            ids, _ = generate(
                run.model, run.params, *arrays, encoded.rows(image), cfg.eval.max_new_tokens, np.array(stop)
            )
            answered += [
                Answered(q.row, q.kind, q.text, q.answer, run.tokenizer.decode(until(row, stop)).strip())
                for q, row in zip(batch, placing.fetch(ids), strict=False)
            ]
        yield Progressed(len(numbers), answered, list(broken.values()))


def summarize(answered: list[Answered], name: str) -> dict[str, float | int]:
    """{name/accuracy: share, name/count: n} overall, and with /kind/ for every kind."""
    groups = collections.defaultdict(list)
    for item in answered:
        groups[""].append(item.correct)
        if item.kind:
            groups[f"/{item.kind.replace('/', '_')}"].append(item.correct)
    results: dict[str, float | int] = {}
    for group, correct in sorted(groups.items()):
        results[f"{name}{group}/accuracy"] = sum(correct) / len(correct)
        results[f"{name}{group}/count"] = len(correct)
    return results


def samples(answered: list[Answered], count: int) -> list[Answered]:
    """`count` answers spread evenly over all of them, to be shown."""
    return [answered[i] for i in np.linspace(0, len(answered) - 1, min(count, len(answered))).astype(int)]
