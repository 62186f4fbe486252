"""What is wrong with a JSON file as a whole: the words of Python's parser, found in windows."""

import json
import random

import pytest

from sparsecut_jax.data import broken_json
from sparsecut_jax.data.broken_json import fault_of

TEXTS = ["a", "\u00e9\u65e5\U0001f600", 'q"[{', "\\", "x" * 300, "\n"]


def written(rng: random.Random) -> bytes:
    rows = [{"a": rng.choice(TEXTS), "n": [rng.randrange(99), None, {"b": 1.5}]} for _ in range(rng.randrange(1, 30))]
    return json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode()


def damaged(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + 1 :]
    if kind == 2:
        return content[:at] + rng.choice([b'"', b",", b"]", b"}", b"x", b"\xff", b"[", b"1"]) + content[at:]
    return content + rng.choice([b"]", b"[]", b" {", b"\xff"])


def by_json(content: bytes) -> str | None:
    try:
        json.loads(content.decode())
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("window", [256, 1 << 20])
def test_the_words_are_those_of_the_parser(monkeypatch, window):
    """Where a byte is no UTF-8, json tells nothing else; here it is what comes first in the file."""
    monkeypatch.setattr(broken_json, "WINDOW", window)
    seen = 0
    for seed in range(600):
        rng = random.Random(seed)
        content = damaged(written(rng), rng)
        expected = by_json(content)
        found = fault_of(content, 0, "FILE")
        if expected is None:
            assert found is None or "expected an object" in str(found) or "expected a list" in str(found), seed
        elif found is None or "is not valid JSON" not in str(found):
            assert "expected an object" in str(found), (seed, expected)  # a row that is none, before the fault
        elif expected.startswith("'utf-8'"):
            assert str(found).startswith("data source 'FILE' is not valid JSON: ")
        else:
            assert str(found) == f"data source 'FILE' is not valid JSON: {expected}", seed
            seen += 1
    assert seen > 300


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", None),
        (b"[ \n ] \t", None),
        (b'[{"a": 1}, 7, nope]', "FILE row 1: expected an object, got int"),
        (b'{"rows": [{"a": 1}]}', "data source 'FILE': expected a list of rows, got dict"),
        (
            b'[{"a": 1},\n {"a": "\xe9"}, x]',
            "data source 'FILE' is not valid JSON: 'utf-8' codec can't decode byte 0xe9 in position 19: "
            "invalid continuation byte",
        ),
        (
            '[{"a": "\u65e5"},\n \u65e5]'.encode(),
            "data source 'FILE' is not valid JSON: Expecting value: line 2 column 2 (char 14)",
        ),
    ],
)
def test_sentence(content, expected):
    found = fault_of(content, 0, "FILE")
    assert found is None if expected is None else str(found) == expected


def test_a_long_value_is_not_held(monkeypatch):
    monkeypatch.setattr(broken_json, "WINDOW", 256)
    monkeypatch.setattr(broken_json, "LONGEST", 1024)
    text = b'[{"a": 1}, {"a": "' + b"x" * 5000
    assert str(fault_of(text, 0, "FILE")) == (
        "data source 'FILE' is not valid JSON: Unterminated string starting at: line 1 column 18 (char 17)"
    )
    whole = b'{"images": [' + b'{"id": 1},' * 1000 + b'{"id": 2}]}'
    assert str(fault_of(whole, 0, "FILE")) == (
        "data source 'FILE': expected a list of rows, got one object of 10,023 bytes"
    )
