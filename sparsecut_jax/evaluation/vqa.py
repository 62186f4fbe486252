"""Generates answers to all questions of a part: every question is asked on its own, every image encoded once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsecut_jax.data.parts import Folder, Part
from sparsecut_jax.data.walk import as_bad
from sparsecut_jax.evaluation.answered import Answered
from sparsecut_jax.inference.engine import Engine, Request
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import placing
from sparsecut_jax.text.conversation import IMAGE, Example, images_of
from sparsecut_jax.text.templates import get_template
from sparsecut_jax.types import BadSample

ROWS_AT_ONCE = 64  # whose images are encoded together
MOST_TOKENS = 512  # of an answer, if no setting gives it: the KV cache grows with it
FIRST, SHORT = 50, 100  # rows searched for an example; characters of a short question
REASON = 1024  # bytes of an error about a broken row that other processes get


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question of a row; `place` is the row's index among those encoded together."""

    place: int
    text: str
    expected: str
    references: tuple[str, ...]
    kind: str
    prompt: Example


def asked_turns(row: dict[str, Any]) -> list[tuple[dict, dict]]:
    """The (human, gpt) pairs that are asked: all independent turns, the first one of a conversation; none whose answer
    has `"loss": false`."""
    pairs = list(zip(row["conversations"][::2], row["conversations"][1::2], strict=True))
    return [pair for pair in (pairs if row.get("independent") else pairs[:1]) if pair[1].get("loss", True)]


def references(row: dict[str, Any], gpt: dict[str, Any]) -> tuple[str, ...]:
    """Correct answers besides that of the turn `gpt`: `answers` of the turn, or of a row with one question.

    Each is a string, or an object with a string "answer" as in the annotations of VQA v2. Raises BadSample.
    """
    asked = asked_turns(row)
    given = gpt.get("answers")
    if given is None:
        given = row.get("answers")
        if given is not None and len(asked) > 1:
            raise BadSample(
                "format", f"key 'answers' is ambiguous for {len(asked)} questions; move it into an answer turn"
            )
    if given is None:
        return ()
    texts = (
        [item.get("answer") if isinstance(item, dict) else item for item in given] if isinstance(given, list) else []
    )
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadSample("format", f"key 'answers' must be a list of strings, got {given!r:.100}")
    return tuple(text.strip() for text in texts)


def questions(rows: dict[int, dict[str, Any]], engine: Engine) -> list[Asked]:
    """The prompts of all questions of some rows, each on its own. `rows`: by their index among those encoded together."""
    asked = []
    for place, row in rows.items():
        for human, gpt in asked_turns(row):
            text = human["value"].replace(IMAGE, "").strip()
            shared = row.get("independent")  # images come before all questions, otherwise where this one has them
            said, images = (text, len(images_of(row))) if shared else (human["value"], human["value"].count(IMAGE))
            prompt, others = engine.prompt(said, images, row.get("system", "")), references(row, gpt)
            asked.append(Asked(place, text, gpt["value"].strip(), others, gpt.get("kind", ""), prompt))
    return asked


def answer_limit(run: Run, part: Part) -> int:
    """Maximum answer length in tokens: config.eval.max_new_tokens or, if that is 0, what the references of the part need.

    That is 1.25 times the longest of them, to allow for other wordings, plus the end token, rounded up to a multiple of 8
    so that few programs are compiled; at most MOST_TOKENS.
    """
    if run.config.eval.max_new_tokens:
        return run.config.eval.max_new_tokens
    texts = set()
    for i in range(len(part)):
        with contextlib.suppress(BadSample):
            row = part.row(i)
            for _, gpt in asked_turns(row):
                texts |= {gpt["value"].strip(), *references(row, gpt)}
    template = get_template(run.template, run.tokenizer)
    longest = max((len(run.tokenizer.encode(template.space + text)) for text in texts), default=0)
    return min(MOST_TOKENS, -(-(longest * 5 // 4 + 2) // 8) * 8)


@dataclasses.dataclass(frozen=True)
class Progressed:
    """The answers to the questions of some rows, and a sentence for each row that could not be read."""

    rows: int
    answered: list[Answered]
    broken: list[str]


def answer_part(run: Run, part: Part, test: str, limit: int) -> Iterator[Progressed]:
    """Answers all questions of a part by greedy decoding with up to `limit` tokens, some rows at a time.

    Each process opens the images that its devices encode; all processes get all answers.
    """
    engine = Engine(run, rows=ROWS_AT_ONCE, size=run.config.eval.batch_size)
    for start in range(0, len(part), engine.rows):
        numbers = range(start, min(start + engine.rows, len(part)))
        rows, views, broken = read_rows(engine, part, numbers)
        asked = questions(rows, engine)
        said = engine.answers(views, [Request(q.prompt, q.place) for q in asked], limit)
        answered = [
            Answered(
                test=test,
                row=str(rows[q.place].get("id", part.number(numbers[q.place]))),
                kind=q.kind,
                question=q.text,
                images=tuple(image_path(part, entry) for entry in images_of(rows[q.place])),
                expected=q.expected,
                references=q.references,
                answer=answer.text,
                cut=answer.cut,
                step=run.step,
            )
            for q, answer in zip(asked, said, strict=True)
        ]
        yield Progressed(len(numbers), answered, broken)


def read_rows(engine: Engine, part: Part, numbers: range) -> tuple[dict[int, dict[str, Any]], np.ndarray, list[str]]:
    """Rows of a part by their index in `numbers`, the pictures of those that are encoded here, and what is wrong with others.

    All processes agree on the rows that are broken, although each opens its own pictures alone.
    """
    rows, views, reasons = {}, engine.no_pictures(), np.zeros((engine.rows, REASON), np.uint8)
    places = {int(at): i for i, at in enumerate(engine.here)}
    for at, number in enumerate(numbers):
        row = {}
        try:
            row = rows[at] = part.row(number)
            for _, gpt in asked_turns(row):
                references(row, gpt)
            if at in places:
                for m, entry in enumerate(images_of(row)):
                    views[places[at], m] = engine.run.pictures.read(part, entry)
        except BadSample as error:
            reason = as_bad(part, number, row, error).reason.encode()[:REASON]
            reasons[at, : len(reason)] = np.frombuffer(reason, np.uint8)
    reasons = placing.gather(reasons).max(0)  # all processes that know it agree
    broken = {at: bytes(reasons[at]).rstrip(b"\0").decode(errors="ignore") for at in reasons.any(1).nonzero()[0]}
    return {at: row for at, row in rows.items() if at not in broken}, views, list(broken.values())


def image_path(part: Part, entry: str | bytes) -> str | None:
    """Path of the image of an entry of a row; None if it is not a file."""
    if isinstance(entry, bytes) or not isinstance(part.pictures, Folder):
        return None
    return os.path.join(part.pictures.path, entry)


def example(parts: list[Part]) -> tuple[str, list[str]]:
    """A question of one of the first rows, and the paths of its images; short and about image files, if possible.

    "PATH" stands for an image that is not a file, such as one in a TFDS dataset.
    """
    best, asked = (-1,), ("what is in the image?", ["PATH"])
    for part in parts:
        for i in range(min(len(part), FIRST)):
            try:
                row = part.row(i)
            except BadSample:
                continue
            human = row["conversations"][0]
            text = human["value"] if human["value"].count(IMAGE) > 1 else human["value"].replace(IMAGE, "").strip()
            entries = images_of(row) if row.get("independent") else images_of(row)[: human["value"].count(IMAGE)]
            images = [image_path(part, entry) or "PATH" for entry in entries]
            files = bool(images) and all(map(os.path.exists, images))
            rank = (files, bool(text) and len(text) <= SHORT and "\n" not in text)
            if rank > best:
                best, asked = rank, (text or IMAGE, images)
            if all(best):
                return asked
    return asked


def samples(answered: list[Answered], count: int) -> list[Answered]:
    """`count` answers, spread evenly over all of them, as examples."""
    return [answered[i] for i in np.linspace(0, len(answered) - 1, min(count, len(answered))).astype(int)]
