"""A LLaVA row becomes tokens, turn by turn, with the loss mask built along the way.

A row is {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}; `<image>` in a human
value marks where an image goes. With `"independent": true` the turns are separate questions about the
image: each sees the image and itself only, as if it had been a row of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sparsecut_jax.data.tokenizer import Tokenizer
from sparsecut_jax.types import UserError

IMAGE = "<image>"
HUMAN, GPT = "human", "gpt"


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written. A special token's name in these texts is that token; in anybody's words it is text.

    Attributes:
      system: text at the very start.
      user, answer: text before a question and before its answer.
      between: text between an answer and the next question of a conversation.
      space: text between `answer` and the answer, predicted with it.
      end: text that ends an answer; None for the tokenizer's end token. Predicted too.
      question: False leaves out what the human says and keeps the image alone.
    """

    system: str = ""
    user: str = ""
    answer: str = ""
    between: str = ""
    space: str = " "
    end: str | None = None
    question: bool = True


CHATML = Template(user="<|im_start|>user\n", answer="<|im_end|>\n<|im_start|>assistant\n", between="\n", space="")
TEMPLATES = {
    # LLaVA's stage 1: the image, then its caption.
    "plain": Template(space="", end="\n", question=False),
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: ",
        answer=" ASSISTANT:",
    ),
    # Turns as Qwen and SmolLM2 have them, without a system turn; a model's own template may put one in front.
    "chatml": CHATML,
    "smollm2": dataclasses.replace(
        CHATML,
        system="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
    ),
    # The shortest one: for models trained from nothing.
    "qa": Template(),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as arrays over its n positions; the fields are those of types.Batch."""

    tokens: np.ndarray  # int32[n]
    loss_mask: np.ndarray  # uint8[n]
    branches: np.ndarray  # int32[n]
    positions: np.ndarray  # int32[n]
    image_start: list[int]


def images_of(row: dict[str, Any]) -> list[str]:
    """Image paths of a row, relative to the source's folder; [] for a text-only row."""
    image = row.get("image", row.get("images", []))
    return [image] if isinstance(image, str) else list(image or [])


def check_row(row: Any, name: str, max_images: int) -> None:
    """Raises UserError naming the row if it is not a conversation this program can train on."""

    def need(ok: bool, sentence: str) -> None:
        if not ok:
            raise UserError(f"{name}: {sentence}")

    need(isinstance(row, dict), f"expected an object, got {type(row).__name__}")
    turns = row.get("conversations")
    need(isinstance(turns, list) and len(turns) > 0, "key 'conversations' must be a list with at least one turn")
    need(not ("image" in row and "images" in row), "both keys 'image' and 'images' are there; expected one of them")
    image = row.get("image", row.get("images"))
    paths = image if isinstance(image, list) else [] if image is None else [image]
    need(all(isinstance(path, str) and path for path in paths), "key 'image' must be a path or a list of paths")
    need(isinstance(row.get("independent", False), bool), "key 'independent' must be true or false")
    marks = 0
    for i, turn in enumerate(turns):
        need(
            isinstance(turn, dict) and isinstance(turn.get("value"), str),
            f"turn {i} must be an object with a text 'value'",
        )
        need(isinstance(turn.get("kind", ""), str), f"turn {i} has 'kind'={turn.get('kind')!r}, expected a text")
        expected = (HUMAN, GPT)[i % 2]
        need(turn.get("from") == expected, f"turn {i} has 'from'={turn.get('from')!r}, expected {expected!r}")
        if expected == HUMAN:
            marks += turn["value"].count(IMAGE)
        else:
            need(turn["value"].strip() != "", f"turn {i} is an empty answer")
    need(len(turns) % 2 == 0, "the last turn is a question without an answer")
    images = len(images_of(row))
    need(marks == images, f"{marks} {IMAGE} in the questions, but {images} images")
    need(images <= max_images, f"{images} images, but config.data.max_images={max_images}")
    if row.get("independent"):
        first = turns[0]["value"]
        need(
            first.startswith(IMAGE * images) and all(IMAGE not in turn["value"] for turn in turns[2:]),
            f"independent turns need every {IMAGE} at the start of the first question",
        )


class TooLong(UserError):
    """The images and the first answer of a row do not fit."""


def encode_row(
    row: dict[str, Any],
    tokenizer: Tokenizer,
    template: Template,
    image_tokens: int,
    seq_len: int,
    order: np.ndarray | None = None,
) -> Example:
    """Tokens and loss mask of a checked row, at most `seq_len` long, cut after the last whole turn that fits.

    Args:
      image_tokens: positions that one image takes (N).
      order: for independent turns, the order to take the questions in (those that do not fit wait
        for another epoch); None for the order of the row.

    Raises:
      TooLong: not even the first answer fits.
    """
    writer = _Writer(tokenizer, image_tokens)
    pairs = list(zip(row["conversations"][::2], row["conversations"][1::2], strict=True))
    name = f"row {row.get('id', '?')!r}"
    independent = bool(row.get("independent")) and template.question
    shared = IMAGE * len(images_of(row))
    if not template.question:
        pairs = pairs[:1]
    writer.special(tokenizer.bos)
    writer.text(template.system)
    if independent:
        if shared:
            writer.prompt(template.user, shared)
        if order is not None:
            pairs = [pairs[i] for i in order]
    kept = 0
    for human, gpt in pairs:
        before = writer.mark()
        if independent:
            writer.new_branch()
            writer.prompt("" if shared else template.user, human["value"].replace(IMAGE, ""))
        else:
            value = human["value"] if template.question else IMAGE * human["value"].count(IMAGE)
            writer.prompt((template.between if kept else "") + template.user, value)
        writer.text(template.answer)
        writer.answer(template.space + gpt["value"], template.end)
        if len(writer.tokens) <= seq_len:
            kept += 1
            continue
        needed = len(writer.tokens)
        writer.back_to(before)
        if not independent:  # of independent questions a shorter one may still fit
            break
    if not kept:
        raise TooLong(f"{name}: its first answer ends at position {needed}, but seq_len={seq_len}")
    return writer.example()


def encode_prompt(prompt: str, images: int, tokenizer: Tokenizer, template: Template, image_tokens: int) -> Example:
    """Tokens of a question that waits for its answer. `<image>` is put in front where the prompt names none.

    Raises:
      UserError: more or fewer `<image>` than images.
    """
    marks = prompt.count(IMAGE)
    if marks == 0:
        prompt = IMAGE * images + ("\n" if images and template.question else "") + prompt
    elif marks != images:
        raise UserError(f"the prompt has {marks} {IMAGE}, but there are {images} images")
    writer = _Writer(tokenizer, image_tokens)
    writer.special(tokenizer.bos)
    writer.text(template.system)
    writer.prompt(template.user, prompt if template.question else IMAGE * images)
    writer.text(template.answer)
    return writer.example()


class _Writer:
    """Grows an Example piece by piece."""

    def __init__(self, tokenizer: Tokenizer, image_tokens: int):
        self.tokenizer, self.image_tokens = tokenizer, image_tokens
        self.tokens: list[int] = []
        self.loss: list[int] = []
        self.branches: list[int] = []
        self.positions: list[int] = []
        self.image_start: list[int] = []
        self.branch = 0
        self.next_position = 0
        self.shared_end = 0

    def new_branch(self) -> None:
        """What follows sees what was written before the first branch, and itself."""
        if self.branch == 0:
            self.shared_end = self.next_position
        self.branch += 1
        self.next_position = self.shared_end

    def special(self, token: int, supervised: bool = False) -> None:
        if token >= 0:
            self._add([token], supervised)

    def text(self, text: str) -> None:
        """Text of the template."""
        self.prompt(text, "")

    def prompt(self, before: str, text: str) -> None:
        """The template's text `before`, then what somebody says, with `<image>` in it.

        What stands behind the template's last special token is tokenised together with the words that follow.
        """
        *whole, rest = self.tokenizer.split_special(before)
        for piece in whole:
            self._add([piece] if isinstance(piece, int) else self.tokenizer.encode(piece), False)
        for i, piece in enumerate((rest + text).split(IMAGE)):
            if i > 0:
                self.image_start.append(len(self.tokens))
                self._add([self.tokenizer.pad] * self.image_tokens, False)
            self._add(self.tokenizer.encode(piece), False)

    def answer(self, text: str, end: str | None) -> None:
        self._add(self.tokenizer.encode(text), True)
        if end is None:
            self.special(self.tokenizer.eos, True)
        else:
            self._add(self.tokenizer.encode(end), True)

    def mark(self) -> tuple[int, int, int, int]:
        return len(self.tokens), len(self.image_start), self.branch, self.next_position

    def back_to(self, mark: tuple[int, int, int, int]) -> None:
        length, images, self.branch, self.next_position = mark
        for column in (self.tokens, self.loss, self.branches, self.positions):
            del column[length:]
        del self.image_start[images:]

    def example(self) -> Example:
        return Example(
            np.array(self.tokens, np.int32),
            np.array(self.loss, np.uint8),
            np.array(self.branches, np.int32),
            np.array(self.positions, np.int32),
            self.image_start,
        )

    def _add(self, ids: tuple[int, ...] | list[int], supervised: bool) -> None:
        self.tokens.extend(ids)
        self.loss.extend([int(supervised)] * len(ids))
        self.branches.extend([self.branch] * len(ids))
        self.positions.extend(range(self.next_position, self.next_position + len(ids)))
        self.next_position += len(ids)
