"""Turns a row into tokens and a loss mask, turn by turn.

A row in LLaVA's format is {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}; `<image>`
in a human value marks where an image goes. With `"independent": true` the turns are separate questions about the
image: each sees only the image and itself, as if it were a separate row. An answer with `"loss": false` is read
by the model but not trained on. `canonical` converts rows in other formats.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sparsecut_jax.text.templates import Template
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import BadSample, UserError

Row = dict[str, Any]
IMAGE = "<image>"
HUMAN, GPT, SYSTEM = "human", "gpt", "system"


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as arrays over its n positions; the fields are those of types.Batch."""

    tokens: np.ndarray  # int32[n]
    loss_mask: np.ndarray  # uint8[n]
    branches: np.ndarray  # int32[n]
    positions: np.ndarray  # int32[n]
    image_start: list[int]
    asked: list[str] = dataclasses.field(default_factory=list)  # for each image, the text of the turn that shows it
    extras: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)  # {name: items}, see types.Extra
    cut: int = 0  # answers cut at the end of a conversation, or independent ones that never fit


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, as `inference.engine.Engine.prompt` makes it, and the number of the row of pictures that it is about."""

    prompt: Example
    row: int = 0


class TooLong(BadSample):
    """The images and the first answer of a row do not fit, or no answer that is trained on fits."""


def images_of(row: Row) -> list[str | bytes]:
    """The images of a row, paths or encoded ones; [] for a text-only row."""
    images = row.get("image", row.get("images"))
    return [] if images is None else list(images) if isinstance(images, list) else [images]


def encode_row(
    row: Row, tokenizer: Tokenizer, template: Template, image_tokens: int, seq_len: int, order: np.ndarray | None = None
) -> Example:
    """Tokens and loss mask of a canonical row, at most `seq_len` long, cut after the last whole turn that fits.

    Args:
      image_tokens: positions that one image takes (N).
      order: in which to take independent questions (those that do not fit wait for another epoch); None: the row's.

    Answers with `"loss": false` are encoded like the others, with a loss mask of 0; independent questions with such
    an answer are left out, since nothing sees them.

    Raises:
      TooLong: not even the first answer that is trained on fits.
      BadSample: the template uses only the first answer, which is not trained on.
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
        pairs = [pair for pair in pairs if pair[1].get("loss", True)]
    if not template.question:
        pairs = pairs[:1]
        if not pairs[0][1].get("loss", True):
            raise BadSample("no_loss", "the template keeps only the first answer, which has loss=false")
    kept, trained, cut, prefix = 0, 0, 0, len(writer.tokens)
    for i, (human, gpt) in enumerate(pairs):
        before = writer.mark()
        if independent:
            writer.new_branch()
            writer.question(template.said(shared + human["value"].replace(IMAGE, "")).removeprefix(shared))
        else:
            writer.text(template.next if kept else "")
            writer.question(_as_asked(human["value"], template))
        writer.text(template.answer)
        writer.answer(gpt["value"], gpt.get("loss", True))
        needed = len(writer.tokens)
        if needed <= seq_len:
            kept += 1
            trained += gpt.get("loss", True)
            continue
        writer.back_to(before)
        if not independent:
            cut = len(pairs) - i
            break
        cut += (
            prefix + needed - len(writer.tokens) > seq_len
        )  # others may still fit, and this one without those before it
    if not kept:
        raise TooLong("too_long", f"its first answer ends at position {needed}, but seq_len={seq_len}")
    if not trained:
        raise TooLong("too_long", f"all answers that fit into seq_len={seq_len} have loss=false")
    return dataclasses.replace(writer.example(), cut=cut)


def encode_prompt(
    prompt: str, images: int, tokenizer: Tokenizer, template: Template, image_tokens: int, system: str = ""
) -> Example:
    """Tokens of a question without its answer. `<image>` is put in front if the prompt has none.

    Raises:
      UserError: more or fewer `<image>` than images.
    """
    marks = prompt.count(IMAGE)
    if marks == 0 and images:
        prompt = f"{IMAGE * images}\n{prompt}"
    elif marks != images:
        raise UserError(f"the prompt has {marks} {IMAGE}, but {images} images are given")
    writer = _Writer(tokenizer, template, image_tokens, system)
    writer.question(_as_asked(prompt, template))
    writer.text(template.answer)
    writer.flush()
    return writer.example()


def with_questions(example: Example, tokenizer: Tokenizer, longest: int) -> Example:
    """The example with at most `longest` tokens of the question about each image, as its extra "question"."""
    ids = [np.array(tokenizer.encode(text)[:longest], np.int32) for text in example.asked]
    return dataclasses.replace(example, extras={**example.extras, "question": ids})


def alone(row: Row) -> list[Row]:
    """The independent questions of a row that are trained on, as a row each; the row itself if it is a conversation."""
    if not row.get("independent"):
        return [row]
    turns, shared = row["conversations"], IMAGE * len(images_of(row))
    pairs = [pair for pair in zip(turns[::2], turns[1::2], strict=True) if pair[1].get("loss", True)]
    ask = lambda human: {**human, "value": shared + human["value"].replace(IMAGE, "")}
    return [{**row, "independent": False, "conversations": [ask(human), gpt]} for human, gpt in pairs] or [row]


def _as_asked(question: str, template: Template) -> str:
    """A question as in LLaVA: a single image is moved to the first line, several stay where they are."""
    marks = question.count(IMAGE)
    if not template.question:
        return IMAGE * marks
    if marks == 1:
        question = f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()
    return template.said(question)


class _Writer:
    """Builds an Example piece by piece.

    Text is tokenised when a special token or an image ends it, all of it at once: everything between two of
    those is one text to the tokenizer, as in LLaVA.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, image_tokens: int, system: str):
        self.tokenizer, self.template, self.image_tokens = tokenizer, template, image_tokens
        self.tokens: list[int] = []
        self.runs: list[tuple[int, int, int, int]] = []  # runs of equal tokens: count, loss, branch, index - position
        self.image_start: list[int] = []
        self.asked: list[str] = []
        self.pending = ""  # text not tokenised yet
        self.branch = 0
        self.position = 0  # of the next token
        if template.bos and tokenizer.bos >= 0:
            self._add((tokenizer.bos,))
        before, words, after = template.opening(system)
        self.text(before)
        self.pending += words
        self.text(after)

    def new_branch(self) -> None:
        """Starts a branch, which sees only what was written before the first branch, and itself."""
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
        """Text of a turn, which may contain `<image>`."""
        first, *others = words.split(IMAGE)
        self.pending += first
        self.asked += [words.replace(IMAGE, "").strip()] * len(others)
        for piece in others:
            self.flush()
            self.image_start.append(len(self.tokens))
            self._add((self.tokenizer.pad,) * self.image_tokens)
            self.pending = piece

    def answer(self, words: str, loss: bool) -> None:
        """An answer, predicted if `loss`. Its tokens are those of the whole text after those of the prompt."""
        template = self.template
        text, *end = ("", self.tokenizer.eos) if template.end is None else self.tokenizer.split_special(template.end)
        text = template.space + template.said(words) + text
        prompt, whole = self.tokenizer.encode(self.pending), self.tokenizer.encode(self.pending + text)
        n = len(prompt)
        # At inference no token can join the prompt's last word with the answer's first.
        answer = whole[n:] if whole[:n] == prompt else self.tokenizer.encode(text)
        self._add(prompt)
        self._add((*answer, *end[:1]), int(loss))
        self.pending = ""

    def flush(self) -> None:
        self._add(self.tokenizer.encode(self.pending))
        self.pending = ""

    def mark(self) -> tuple[Any, ...]:
        return len(self.tokens), len(self.runs), len(self.image_start), self.pending, self.branch, self.position

    def back_to(self, mark: tuple[Any, ...]) -> None:
        length, runs, images, self.pending, self.branch, self.position = mark
        del self.tokens[length:], self.runs[runs:], self.image_start[images:], self.asked[images:]

    def example(self) -> Example:
        count, *columns = np.array(self.runs, np.int32).reshape(-1, 4).T
        loss, branches, before = np.repeat(columns, count, axis=1)
        positions = np.arange(len(self.tokens), dtype=np.int32) - before
        tokens, loss = np.array(self.tokens, np.int32), loss.astype(np.uint8)
        return Example(tokens, loss, branches, positions, self.image_start, self.asked)

    def _add(self, ids: tuple[int, ...], loss: int = 0) -> None:
        if ids:
            self.runs.append((len(ids), loss, self.branch, len(self.tokens) - self.position))
            self.tokens += ids
            self.position += len(ids)
