"""Finds which columns of a table, members of a tar or keys of an object hold a row's images, question and answer.

The result is a row in one of the formats that `canonical` reads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sparsecut_jax.data.rows import Row, place
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.text.conversation import GPT, HUMAN, IMAGE
from sparsecut_jax.types import BadSample, UserError, nearest

IMAGES = ("image", "images")
CONVERSATIONS = ("conversations", "messages", "texts")  # texts: [{"user", "assistant"}, ...], The Cauldron's
ANSWERS = ("answer", "answers", "caption", "text", "txt")
DEFAULT = SourceConfig()


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Names of columns, "" for none. `question` may be the question itself.

    Attributes:
      labels: names of an answer that is a number.
    """

    image: str
    conversation: str
    question: str
    answer: str
    labels: tuple[str, ...] = ()

    def row(self, values: Row) -> Row:
        """The row of these values. Raises BadSample."""
        used = {"image", "images", self.image, self.conversation, self.question}
        row = {name: value for name, value in values.items() if name not in used and name != self.answer}
        pictures = self._pictures(values)
        several = isinstance(pictures, list)
        if pictures is not None:
            row["images" if several else "image"] = pictures
        count = len(pictures) if several else int(pictures is not None)
        if self.conversation == "texts":
            row["conversations"] = _pairs(values["texts"], count)
        elif self.conversation:
            row[self.conversation] = _turns(values.get(self.conversation), self.conversation)
        else:
            question = _text(values[self.question], self.question) if self.question in values else self.question
            value = values.get(self.answer)
            if isinstance(value, list):
                value = [text.get("answer", text) if isinstance(text, dict) else text for text in value]  # VQAv2's
                if all(isinstance(text, str) for text in value):
                    row["answers"] = value
            row["conversations"] = _asked(question, _text(value, self.answer, self.labels, "no_answer"), count)
        return row

    def _pictures(self, values: Row) -> Any:
        """One image or a list of them as bytes or paths; from whichever of the columns `image` and `images` is not null."""
        given = [_entries(values.get(name)) for name in (IMAGES if self.image in IMAGES else (self.image,))]
        present = [pictures for pictures in given if pictures not in (None, [])]
        if len(present) > 1:
            raise BadSample("format", "both columns 'image' and 'images' are present; expected only one")
        return present[0] if present else next((pictures for pictures in given if pictures is not None), None)


def spelling_of(names: Collection[str], source: SourceConfig, pictures: Sequence[str] = ()) -> Spelling:
    """The roles of columns, from the settings of the source, otherwise from their names.

    Args:
      pictures: names of columns that hold pictures, by their type.

    Raises:
      UserError: a setting names a missing column, or there is no answer.
    """
    image = source.image
    if image not in names and image:
        if image != DEFAULT.image:
            raise _unknown(names, "image", image)
        image = "images" if "images" in names else ""
        if not image and len(pictures) > 1:
            raise UserError(f"several columns hold images: {', '.join(pictures)}; name one as image=...")
        image = image or "".join(pictures)
    chosen = source.question != DEFAULT.question or source.answer != DEFAULT.answer
    conversation = "" if chosen else next((name for name in CONVERSATIONS if name in names), "")
    if conversation:
        return Spelling(image, conversation, "", "")
    question, answer = source.question, source.answer
    if question not in names and re.fullmatch(r"\w+", question):  # a word, not a question
        raise _unknown(names, "question", question)
    question = question or ("question" if "question" in names else "")
    if answer not in names:
        if answer != DEFAULT.answer:
            raise _unknown(names, "answer", answer)
        answer = next((name for name in ANSWERS if name in names), "")
    elif answer == DEFAULT.answer and "answer" in names and "question" in names:
        answer = "answer"
    if not answer:
        raise UserError(
            f"expected a column {', '.join(CONVERSATIONS[:2])}, or question and answer, or caption; "
            f"got {', '.join(names) or 'none'}; name others as question=... and answer=... in config.data.mix"
        )
    if not question and not image:
        raise UserError(f"an answer {answer!r}, but neither a question nor an image; got {', '.join(names)}")
    return Spelling(image, "", question, answer)


class Spelled(Sequence):
    """Rows of objects whose keys may differ from row to row."""

    def __init__(self, rows: Sequence[Row], source: SourceConfig):
        self.rows, self.source = rows, source
        self.plain = (source.image, source.question, source.answer) == (DEFAULT.image, DEFAULT.question, DEFAULT.answer)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        row = self.rows[i]
        if not isinstance(row, dict) or self.plain and ("conversations" in row or "messages" in row):
            return row
        try:
            spelling = _spelling(tuple(row), self.source)
        except UserError as error:
            if self.plain:
                return row  # its errors are reported like those of any other row
            raise BadSample("format", str(error)) from None
        return spelling.row(row)

    def fingerprint(self) -> str:
        columns = "" if self.plain else f" as {self.source.image!r}, {self.source.question!r}, {self.source.answer!r}"
        return self.rows.fingerprint() + columns

    def place(self, i: int) -> str:
        return place(self.rows, i)


@functools.lru_cache(maxsize=256)
def _spelling(names: tuple[str, ...], source: SourceConfig) -> Spelling:
    return spelling_of(names, source)


def _unknown(names: Iterable[str], setting: str, name: str) -> UserError:
    return UserError(f"no column {setting}={name!r}{nearest(name, names)}; the columns are {', '.join(names)}")


def _entries(value: Any) -> Any:
    """The pictures of a cell; nulls among them are left out."""
    if isinstance(value, list):
        return [entry for entry in map(_entry, value) if entry is not None]
    return _entry(value)


def _entry(value: Any) -> Any:
    """An image of a row: bytes or a path, from the pair of both that `datasets` writes."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value


def _text(value: Any, name: str, labels: tuple[str, ...] = (), cause: str = "format") -> str:
    """The text of a cell; of a list its first one."""
    while isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, int) and not isinstance(value, bool) and labels:
        if not 0 <= value < len(labels):
            raise BadSample(cause, f"column {name!r} has no label {value}")
        return labels[value]
    if value is None or value == [] or value != value:  # pandas writes NaN for missing values
        raise BadSample(cause, f"column {name!r} is empty")
    if isinstance(value, str | int | float):
        return str(value)
    raise BadSample("format", f"column {name!r} is a {type(value).__name__}, expected a string or a number")


def _asked(question: str, answer: str, images: int) -> list[Row]:
    """One question with its pictures, and the answer."""
    if IMAGE not in question:
        question = IMAGE * images + ("\n" if images and question else "") + question
    return [{"from": HUMAN, "value": question}, {"from": GPT, "value": answer}]


def _turns(value: Any, name: str) -> Any:
    """A list of turns, from a JSON string or from one list per key."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadSample("text", f"column {name!r} is a string, but not valid JSON: {error}") from None
    columns = list(value.values()) if isinstance(value, dict) else [None]
    if all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    return value


def _pairs(value: Any, images: int) -> list[Row]:
    """Turns of [{"user", "assistant"}, ...]; the first one is about all images if none is marked."""
    value = _turns(value, "texts")
    turns = []
    for i, pair in enumerate(value if isinstance(value, list) else ()):
        if not (
            isinstance(pair, dict) and isinstance(pair.get("user"), str) and isinstance(pair.get("assistant"), str)
        ):
            raise BadSample("format", f"pair {i} of column 'texts' must have the strings 'user' and 'assistant'")
        turns += [{"from": HUMAN, "value": pair["user"]}, {"from": GPT, "value": pair["assistant"]}]
    if turns and not any(IMAGE in turn["value"] for turn in turns[::2]):
        turns[:2] = _asked(turns[0]["value"], turns[1]["value"], images)
    return turns
