"""A row becomes tokens, turn by turn, with the loss mask built along the way.

A row in LLaVA's spelling is {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}; `<image>`
in a human value marks where an image goes. With `"independent": true` the turns are separate questions about the
image: each sees the image and itself only, as if it had been a row of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sparsecut_jax.data.templates import Template
from sparsecut_jax.data.tokenizer import Tokenizer
from sparsecut_jax.types import BadSample, UserError

Row = dict[str, Any]
IMAGE = "<image>"
HUMAN, GPT, SYSTEM = "human", "gpt", "system"
SPEAKERS = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT, "system": SYSTEM}


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as arrays over its n positions; the fields are those of types.Batch."""

    tokens: np.ndarray  # int32[n]
    loss_mask: np.ndarray  # uint8[n]
    branches: np.ndarray  # int32[n]
    positions: np.ndarray  # int32[n]
    image_start: list[int]


class TooLong(BadSample):
    """The images and the first answer of a row do not fit."""


def images_of(row: Row) -> list[str | bytes]:
    """The images of a row, paths or encoded ones; [] for a text-only row."""
    images = row.get("image", row.get("images"))
    return [] if images is None else list(images) if isinstance(images, list) else [images]


def canonical(row: Any, name: str, max_images: int) -> Row:
    """A row of any known spelling in LLaVA's: questions and answers in turn, and a system message under "system".

    Known are `conversations` and `messages`, of from/value or role/content. An answer before the first question is
    left out, and so is a question after the last answer.

    Raises:
      BadSample: it is no conversation this program can train on; the sentence begins with `name`.
    """
    try:
        return _canonical(row, max_images)
    except BadSample as error:
        raise BadSample(error.cause, f"{name}: {error}") from None


def _canonical(row: Any, max_images: int) -> Row:
    if not isinstance(row, dict):
        raise BadSample("format", f"expected an object, got {type(row).__name__}")
    given = row.get("conversations", row.get("messages"))
    if not isinstance(given, list) or not given:
        raise BadSample("format", "key 'conversations' must be a list with at least one turn")
    if not isinstance(row.get("independent", False), bool):
        raise BadSample("format", "key 'independent' must be true or false")
    if "image" in row and "images" in row:
        raise BadSample("format", "both keys 'image' and 'images' are there; expected one of them")
    images = images_of(row)
    if not all(isinstance(image, str | bytes) and image for image in images):
        raise BadSample("format", "key 'image' must be a path or a list of paths")
    turns = [_turn(turn, i) for i, turn in enumerate(given)]

    first, system = 0, row.get("system") or ""
    if turns[0]["from"] == SYSTEM:
        first, system = 1, turns[0]["value"]
    if not isinstance(system, str):
        raise BadSample("format", f"key 'system' must be a text, got {system!r:.100}")
    if len(turns) > first and turns[first]["from"] == GPT:
        first += 1
    for i in range(first, len(turns)):
        expected = (HUMAN, GPT)[(i - first) % 2]
        if turns[i]["from"] != expected:
            raise BadSample("roles", f"turn {i} is of {turns[i]['from']!r}, expected {expected!r}")
        if expected == GPT and not turns[i]["value"].strip():
            raise BadSample("no_answer", f"turn {i} is an empty answer")
    turns = turns[first:]
    if len(turns) < 2:
        raise BadSample("no_answer", "there is no question with an answer")

    marks = [turn["value"].count(IMAGE) for turn in turns[::2]]
    if sum(marks) != len(images):
        raise BadSample("image_count", f"{sum(marks)} {IMAGE} in the questions, but {len(images)} images")
    if len(turns) % 2:
        del turns[-1], images[len(images) - marks.pop() :]
    if len(images) > max_images:
        raise BadSample("image_count", f"{len(images)} images, but config.data.max_images={max_images}")
    if row.get("independent") and not (turns[0]["value"].startswith(IMAGE * len(images)) and not any(marks[1:])):
        raise BadSample("image_count", f"independent turns need every {IMAGE} at the start of the first question")

    if turns == given and "messages" not in row and system == row.get("system", ""):
        return row
    others = {key: row[key] for key in row if key not in ("conversations", "messages", "image", "images", "system")}
    return others | {"images": images, "conversations": turns} | ({"system": system} if system else {})


def _turn(turn: Any, i: int) -> Row:
    """Turn `i` as {"from": HUMAN, GPT or SYSTEM, "value"}, and whatever else stands in it."""
    if not isinstance(turn, dict):
        raise BadSample("format", f"turn {i} must be an object, got {type(turn).__name__}")
    who, words = ("role", "content") if "role" in turn else ("from", "value")
    name, value = turn.get(who), turn.get(words)
    speaker = SPEAKERS.get(name) if isinstance(name, str) else None
    if speaker is None:
        raise BadSample("roles", f"turn {i} has {who!r}={name!r:.100}, expected one of {', '.join(SPEAKERS)}")
    text = _joined(value, speaker) if isinstance(value, list) else value
    if not isinstance(text, str):
        raise BadSample("format", f"turn {i} must be an object with a text {words!r}")
    if not isinstance(turn.get("kind", ""), str):
        raise BadSample("format", f"turn {i} has 'kind'={turn['kind']!r:.100}, expected a text")
    if text is turn.get("value") and speaker == turn.get("from"):
        return turn
    return {key: turn[key] for key in turn if key not in ("role", "content")} | {"from": speaker, "value": text}


def _joined(parts: list[Any], speaker: str) -> str | None:
    """The text of a content in parts; None for anything but texts, and images in questions."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else IMAGE if kind == "image" and speaker == HUMAN else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def encode_row(
    row: Row, tokenizer: Tokenizer, template: Template, image_tokens: int, seq_len: int, order: np.ndarray | None = None
) -> Example:
    """Tokens and loss mask of a canonical row, at most `seq_len` long, cut after the last whole turn that fits.

    Args:
      image_tokens: positions that one image takes (N).
      order: to take independent questions in (those that do not fit wait for another epoch); None for the row's.

    Raises:
      TooLong: not even the first answer fits.
    """
    turns = row["conversations"]
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    independent = bool(row.get("independent")) and template.question
    shared = IMAGE * len(images_of(row))
    writer = _Writer(tokenizer, template, image_tokens, row.get("system", ""))
    if independent:
        writer.question(shared)
        if order is not None:
            pairs = [pairs[i] for i in order]
    if not template.question:
        pairs = pairs[:1]
    kept = 0
    for human, gpt in pairs:
        before = writer.mark()
        if independent:
            writer.new_branch()
            writer.question(template.said(shared + human["value"].replace(IMAGE, "")).removeprefix(shared))
        else:
            writer.text(template.next if kept else "")
            writer.question(_as_asked(human["value"], template))
        writer.text(template.answer)
        writer.answer(gpt["value"])
        if len(writer.tokens) <= seq_len:
            kept += 1
            continue
        needed = len(writer.tokens)
        writer.back_to(before)
        if not independent:  # of independent questions a shorter one may still fit
            break
    if not kept:
        raise TooLong("too_long", f"its first answer ends at position {needed}, but seq_len={seq_len}")
    return writer.example()


def encode_prompt(
    prompt: str, images: int, tokenizer: Tokenizer, template: Template, image_tokens: int, system: str = ""
) -> Example:
    """Tokens of a question that waits for its answer. `<image>` is put in front where the prompt names none.

    Raises:
      UserError: more or fewer `<image>` than images.
    """
    marks = prompt.count(IMAGE)
    if marks == 0 and images:
        prompt = f"{IMAGE * images}\n{prompt}"
    elif marks != images:
        raise UserError(f"the prompt has {marks} {IMAGE}, but there are {images} images")
    writer = _Writer(tokenizer, template, image_tokens, system)
    writer.question(_as_asked(prompt, template))
    writer.text(template.answer)
    writer.flush()
    return writer.example()


def _as_asked(question: str, template: Template) -> str:
    """A question as LLaVA has it: a single image stands on the first line, several stay where they are."""
    marks = question.count(IMAGE)
    if not template.question:
        return IMAGE * marks
    if marks == 1:
        question = f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()
    return template.said(question)


class _Writer:
    """Grows an Example piece by piece.

    Text is tokenised when a special token or an image ends it, all of it at once: the words of template and people
    between two of those are one text to the tokenizer, as they are in LLaVA.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, image_tokens: int, system: str):
        self.tokenizer, self.template, self.image_tokens = tokenizer, template, image_tokens
        self.tokens: list[int] = []
        self.runs: list[tuple[int, int, int, int]] = []  # of like tokens: count, loss, branch, index - position
        self.image_start: list[int] = []
        self.pending = ""  # text that is not tokenised yet
        self.branch = 0
        self.position = 0  # of the next token
        if template.bos and tokenizer.bos >= 0:
            self._add((tokenizer.bos,))
        before, words, after = template.opening(system)
        self.text(before)
        self.pending += words
        self.text(after)

    def new_branch(self) -> None:
        """What follows sees what was written before the first branch, and itself."""
        if self.branch == 0:
            self.shared = self.pending, self.position
        self.pending, self.position = self.shared
        self.branch += 1

    def text(self, text: str) -> None:
        """Text of the template."""
        for piece in self.tokenizer.split_special(text):
            if isinstance(piece, int):
                self.flush()
                self._add((piece,))
            else:
                self.pending += piece

    def question(self, words: str) -> None:
        """What somebody says, with `<image>` in it."""
        first, *others = words.split(IMAGE)
        self.pending += first
        for piece in others:
            self.flush()
            self.image_start.append(len(self.tokens))
            self._add((self.tokenizer.pad,) * self.image_tokens)
            self.pending = piece

    def answer(self, words: str) -> None:
        """What is to be predicted. Its tokens are those of the whole text that follow the tokens of the prompt."""
        template = self.template
        text, *end = ("", self.tokenizer.eos) if template.end is None else self.tokenizer.split_special(template.end)
        text = template.space + template.said(words) + text
        prompt, whole = self.tokenizer.encode(self.pending), self.tokenizer.encode(self.pending + text)
        n = len(prompt)
        # A token that joins the prompt's last word with the answer's first would not be there when the model is asked.
        answer = whole[n:] if whole[:n] == prompt else self.tokenizer.encode(text)
        self._add(prompt)
        self._add((*answer, *end[:1]), loss=1)
        self.pending = ""

    def flush(self) -> None:
        self._add(self.tokenizer.encode(self.pending))
        self.pending = ""

    def mark(self) -> tuple[Any, ...]:
        return len(self.tokens), len(self.runs), len(self.image_start), self.pending, self.branch, self.position

    def back_to(self, mark: tuple[Any, ...]) -> None:
        length, runs, images, self.pending, self.branch, self.position = mark
        del self.tokens[length:], self.runs[runs:], self.image_start[images:]

    def example(self) -> Example:
        count, *columns = np.array(self.runs, np.int32).reshape(-1, 4).T
        loss, branches, before = np.repeat(columns, count, axis=1)
        positions = np.arange(len(self.tokens), dtype=np.int32) - before
        return Example(np.array(self.tokens, np.int32), loss.astype(np.uint8), branches, positions, self.image_start)

    def _add(self, ids: tuple[int, ...], loss: int = 0) -> None:
        if ids:
            self.runs.append((len(ids), loss, self.branch, len(self.tokens) - self.position))
            self.tokens += ids
            self.position += len(ids)
