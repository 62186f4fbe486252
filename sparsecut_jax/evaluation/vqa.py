"""Exact-match accuracy by generation: every question asked alone, every image encoded once."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sparsecut_jax import sharding
from sparsecut_jax.data.conversation import IMAGE, Example, encode_prompt, images_of
from sparsecut_jax.data.parts import Part
from sparsecut_jax.data.templates import get_template, stop_ids
from sparsecut_jax.data.walk import as_bad
from sparsecut_jax.inference.decoding import encode_images, generate, pad_prompts, until
from sparsecut_jax.inference.run import Run
from sparsecut_jax.types import BadSample

IMAGES_AT_ONCE = 64


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
    """The (human, gpt) pairs that are asked: all independent turns, the first one of a conversation."""
    pairs = list(zip(row["conversations"][::2], row["conversations"][1::2], strict=True))
    return pairs if row.get("independent") else pairs[:1]


def questions(rows: list[dict[str, Any]], run: Run) -> list[Question]:
    """The prompts of all questions of some rows, each on its own."""
    found, template = [], get_template(run.template, run.tokenizer)
    for i, row in enumerate(rows):
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

    The last short batch is filled up with empty prompts, whose answers are thrown away.
    """
    cfg, placed = run.config, sharding.batch_sharding(run.mesh)
    stop = stop_ids(run.tokenizer, get_template(run.template, run.tokenizer))
    ways = sharding.data_parallel(run.mesh)
    at_once, size = (-(-n // ways) * ways for n in (IMAGES_AT_ONCE, cfg.eval.batch_size))
    for start in range(0, len(part), at_once):
        numbers = range(start, min(start + at_once, len(part)))
        rows, broken = [], []
        views = np.zeros((at_once, cfg.data.max_images, *run.pictures.shape), np.uint8)
        for number in numbers:
            row = {}
            try:
                row = part.row(number)
                pictures = [run.pictures.read(part, entry) for entry in images_of(row)]
            except BadSample as error:
                broken.append(as_bad(part, number, row, error).reason)
                continue
            for m, picture in enumerate(pictures):
                views[len(rows), m] = picture
            rows.append(row)
        encoded = encode_images(run.model, run.params, jax.device_put(views, placed))
        asked, answered = questions(rows, run), []
        for first in range(0, len(asked), size):
            batch = asked[first : first + size]
            image = np.zeros(size, np.int32)
            image[: len(batch)] = [q.image for q in batch]
            arrays = pad_prompts([q.prompt for q in batch], size, cfg.data.max_images)
            *arrays, image = jax.device_put((*arrays, image), placed)
            ids, _ = generate(
                run.model, run.params, *arrays, encoded.rows(image), cfg.eval.max_new_tokens, np.array(stop)
            )
            answered += [
                Answered(q.row, q.kind, q.text, q.answer, run.tokenizer.decode(until(row, stop)).strip())
                for q, row in zip(batch, np.asarray(ids), strict=False)
            ]
        yield Progressed(len(numbers), answered, broken)


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
