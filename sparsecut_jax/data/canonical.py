"""Converts rows from the formats that people and tools write to LLaVA's, or refuses them in one sentence.

Supported are `conversations` and `messages` of from/value or role/content, contents in parts, and images as paths, data
URLs, base64 or bytes, beside the turns or inside them. Null values are treated as absent, as pandas and `datasets` write them.
"""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse
from typing import Any

from sparsecut_jax.text.conversation import GPT, HUMAN, IMAGE, SYSTEM, Row, images_of
from sparsecut_jax.types import BadSample

SPEAKERS = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT, "system": SYSTEM}
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
HOLDERS = ("bytes", "base64", "image", "image_url", "url", "path")  # keys of an object that may hold an image
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # as keys of a row
OTHER_MARKS = re.compile("<video>|<audio>")  # as LLaMA-Factory and ms-swift write them
TRAINED = frozenset(("loss", "train", "weight"))  # keys of a turn, as ms-swift, Axolotl and OpenAI call them
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# The formats' first bytes in base64, long enough that no file name begins like this.
BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3]|AAAA)[A-Za-z0-9+/\s]{36,}={0,2}\s*")


def canonical(row: Any, name: str, max_images: int) -> Row:
    """A row in LLaVA's format: questions and answers in turn, a system message under "system", images as paths or
    encoded files, and `"loss": false` in the answers that are not trained on.

    An answer before the first question is left out, and so is a question after the last answer.

    Raises:
      BadSample: it is not a conversation that can be trained on; the message begins with `name`.
    """
    try:
        return _canonical(row, max_images)
    except BadSample as error:
        raise BadSample(error.cause, f"{name}: {error}") from None


def _canonical(row: Any, max_images: int) -> Row:
    if not isinstance(row, dict):
        raise BadSample("format", f"expected an object, got {type(row).__name__}")
    if _has_nulls(row):
        row = _without_nulls(row) or {}
    for key in OTHER_MEDIA:
        if row.get(key):
            raise _unsupported(f"key {key!r} is present")
    given = _one_of(row, "conversations", "messages")
    if not isinstance(given, list) or not given:
        raise BadSample("format", "key 'conversations' must be a list with at least one turn")
    if not isinstance(row.get("independent", False), bool):
        raise BadSample("format", "key 'independent' must be true or false")
    beside = images_of({"image": _one_of(row, "image", "images")})
    images = [_image(image) for image in beside]
    if not all(images):
        raise BadSample("format", "key 'image' must be a path or a list of paths")
    turns = []
    for i, turn in enumerate(given):
        turn, inside = _turn(turn, i)
        turns.append(turn)
        if inside and beside:
            raise BadSample(
                "image_count", f"turn {i} has its own image, but the row has key 'image' or 'images' as well"
            )
        images += inside

    first, system = 0, row.get("system") or ""
    if turns[0]["from"] == SYSTEM:
        first, system = 1, turns[0]["value"]
    if not isinstance(system, str):
        raise BadSample("format", f"key 'system' must be a string, got {system!r:.100}")
    if len(turns) > first and turns[first]["from"] == GPT:
        first += 1
    for i in range(first, len(turns)):
        expected = (HUMAN, GPT)[(i - first) % 2]
        if turns[i]["from"] != expected:
            raise BadSample("roles", f"turn {i} is from {turns[i]['from']!r}, expected {expected!r}")
        if expected == GPT and not turns[i]["value"].strip():
            raise BadSample("no_answer", f"turn {i} is an empty answer")
    turns = turns[first:]
    if len(turns) < 2:
        raise BadSample("no_answer", "no question has an answer")
    if not any(turn.get("loss", True) for turn in turns[1::2]):
        raise BadSample("no_loss", "every answer has loss=false or weight=0, so there is nothing to train on")

    marks = [turn["value"].count(IMAGE) for turn in turns[::2]]
    if sum(marks) != len(images):
        raise BadSample("image_count", f"{sum(marks)} {IMAGE} in the questions, but {len(images)} images")
    if len(turns) % 2:
        del turns[-1], images[len(images) - marks.pop() :]
    if len(images) > max_images:
        raise BadSample("image_count", f"{len(images)} images, but config.data.max_images={max_images}")
    if row.get("independent") and not (turns[0]["value"].startswith(IMAGE * len(images)) and not any(marks[1:])):
        raise BadSample("image_count", f"independent turns need every {IMAGE} at the start of the first question")

    same = turns == row.get("conversations") and images == images_of(row) and system == row.get("system", "")
    if same and not ("image" in row and "images" in row) and "messages" not in row:
        return row
    others = {key: row[key] for key in row if key not in ("conversations", "messages", "image", "images", "system")}
    return others | {"images": images, "conversations": turns} | ({"system": system} if system else {})


def _has_nulls(value: Any) -> bool:
    """Whether anything in it is null, or NaN, which pandas writes for it."""
    kind = type(value)
    if kind is not dict and kind is not list:
        return value is None or (kind is float and value != value)
    for inner in value.values() if kind is dict else value:  # noqa: SIM110 (`any` takes three times as long)
        if type(inner) is not str and _has_nulls(inner):
            return True
    return False


def _without_nulls(value: Any) -> Any:
    """The value without null keys and items and without objects in which all is null; None if nothing is left."""
    if isinstance(value, dict):
        without = {key: _without_nulls(inner) for key, inner in value.items()}
        return {key: inner for key, inner in without.items() if inner is not None} or (None if value else value)
    if isinstance(value, list):
        return [inner for inner in map(_without_nulls, value) if inner is not None]
    return None if _has_nulls(value) else value


def _one_of(row: Row, key: str, other: str) -> Any:
    """The value of whichever of two keys is present and not an empty list."""
    one, two = row.get(key), row.get(other)
    if one not in (None, []) and two not in (None, []):
        raise BadSample("format", f"both keys {key!r} and {other!r} are present; expected only one")
    return two if one in (None, []) else one


def _unsupported(what: str) -> BadSample:
    return BadSample("unsupported", f"{what}, but only text and images are supported, not video or audio")


# ----------------------------------------------------------------------------------------------------------------------
# turns


def _turn(turn: Any, i: int) -> tuple[Row, list[str | bytes]]:
    """Turn `i` as {"from": HUMAN, GPT or SYSTEM, "value"}, with its other keys; and its images."""
    if not isinstance(turn, dict):
        raise BadSample("format", f"turn {i} must be an object, got {type(turn).__name__}")
    who, words = ("role", "content") if "role" in turn else ("from", "value")
    name, text = turn.get(who), turn.get(words)
    speaker = SPEAKERS.get(name) if isinstance(name, str) else None
    if speaker is None:
        raise BadSample("roles", f"turn {i} has {who!r}={name!r:.100}, expected one of {', '.join(SPEAKERS)}")
    images: list[str | bytes] = []
    if isinstance(text, list):
        text, images = _joined(text, speaker, i)
    if not isinstance(text, str):
        raise BadSample("format", f"turn {i} must be an object with a string {words!r}")
    if not isinstance(turn.get("kind", ""), str):
        raise BadSample("format", f"turn {i} has 'kind'={turn['kind']!r:.100}, expected a string")
    if speaker == HUMAN and (mark := OTHER_MARKS.search(text)):
        raise _unsupported(f"turn {i} has a {mark[0]}")
    trained = None if TRAINED.isdisjoint(turn) else _trained(turn, i, speaker)
    if text is turn.get("value") and speaker == turn.get("from") and trained is None:
        return turn, images
    canonical_turn = {key: turn[key] for key in turn if key not in TRAINED and key not in ("role", "content")}
    canonical_turn |= {"from": speaker, "value": text}
    if trained is False and speaker == GPT:
        canonical_turn["loss"] = False
    return canonical_turn, images


def _trained(turn: Row, i: int, speaker: str) -> bool:
    """Whether a turn is trained on, according to its keys."""
    said = {key: turn[key] for key in sorted(TRAINED) if key in turn}
    for key, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            expected = "0 or 1; other weights are not supported" if key == "weight" else "true or false"
            raise BadSample("format", f"turn {i} has {key!r}={value!r:.100}, expected {expected}")
    if len({bool(value) for value in said.values()}) > 1:
        raise BadSample("format", f"turn {i} contradicts itself: {', '.join(f'{k}={v}' for k, v in said.items())}")
    trained = bool(next(iter(said.values())))
    if trained and speaker != GPT:
        key, value = next(iter(said.items()))
        raise BadSample("format", f"turn {i} from {speaker!r} has {key!r}={value!r}, but only answers are trained on")
    return trained


def _joined(parts: list[Any], speaker: str, i: int) -> tuple[str, list[str | bytes]]:
    """The text of a content in parts, with a mark for each image of a question; and its images."""
    texts, images = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in IMAGE_PARTS and speaker == HUMAN:
            texts.append(IMAGE)
            if any(key in part for key in HOLDERS):
                image = _image(part)
                if not image:
                    raise BadSample("format", f"turn {i} has an image part with keys {', '.join(part)}; expected exactly one of "
                                    f"{', '.join(HOLDERS)}, with a path or an encoded image")  # fmt: skip
                images.append(image)
        elif isinstance(kind, str) and ("video" in kind or "audio" in kind):
            raise _unsupported(f"turn {i} has a part of type {kind!r}")
        else:
            expected = "texts and images" if speaker == HUMAN else "texts"
            what = repr(kind) if isinstance(kind, str) else f"{part!r:.60}"
            raise BadSample("format", f"turn {i} has a part {what} in its content, expected {expected}")
    return "".join(texts), images


# ----------------------------------------------------------------------------------------------------------------------
# images


def _image(given: Any) -> str | bytes | None:
    """An image as a path or an encoded file; None if it is neither of them nor an object with one.

    Raises:
      BadSample: it is a remote URL, or its base64 is damaged.
    """
    if isinstance(given, dict):
        keys = [key for key in HOLDERS if key in given]
        if "bytes" in keys:  # `datasets` stores the original file name beside them
            keys = ["bytes"]
        if len(keys) != 1:
            return None
        value = given[keys[0]]
        return _decoded(value, "base64") if keys[0] in ("bytes", "base64") and isinstance(value, str) else _image(value)
    if not isinstance(given, str):
        return given if isinstance(given, bytes) else None
    if given[:5].lower() == "data:":
        head, _, data = given.partition(",")
        kind, *options = head[5:].lower().split(";")
        if kind and not kind.startswith("image/"):
            raise BadSample("broken_image", f"an image is a data URL of type {kind!r:.60}, expected image/...")
        if "base64" not in options:
            raise BadSample("broken_image", f"an image is a data URL without ;base64: {given!r:.60}")
        return _decoded(data, "data URL")
    if given[:7].lower() == "file://":
        return urllib.parse.unquote(urllib.parse.urlsplit(given).path)
    if REMOTE.match(given):
        raise BadSample("remote_image", f"image {given!r:.200} is a URL, and images are not downloaded; "
                        "download it into the image folder and give its path")  # fmt: skip
    return _decoded(given, "base64") if BASE64.fullmatch(given) else given


def _decoded(text: str, kind: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("broken_image", f"the {kind} of an image is not valid: {error}") from None
    if not data:
        raise BadSample("broken_image", f"the {kind} of an image is empty")
    return data
