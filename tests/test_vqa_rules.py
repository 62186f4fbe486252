"""Answers are compared as the VQA challenge does: its normalization, and its published score."""

import pytest

from sparsecut_jax.text.vqa_rules import normalize, vqa_score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red.", "red"),
        ("The  two dogs, I dont know", "2 dogs i don't know"),
        ("a An THE", ""),
        ("100,978 people", "100978 people"),
        ("red,blue", "red blue"),
        ("It is 2:50 pm.", "it is 2:50 pm"),
        ("1.5 m", "1.5 m"),
        ("U.S.A.", "usa"),
        ("none", "0"),
        ("ten-speed", "10 speed"),
        ("girl's its", "girl's its"),
        ("couldntve couldn\u2019tve", "couldn't've couldn't've"),
        ("black_and/white?", "black and white"),
        ("日本 語。", "日本 語"),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_vqa_score_is_the_published_one(same, expected):
    """The mean of min(1, n / 3) over the ten ways to leave one human out."""
    assert vqa_score("Yes.", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(expected)
