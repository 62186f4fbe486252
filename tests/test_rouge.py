"""ROUGE-L by hand."""

import pytest

from sparsecut_jax.text.rouge import rouge_l


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("a b c d", ["a c d x"], 0.75),
        ("a b c d", ["x", "a b c d"], 1.0),
        ("", ["a"], 0.0),
        ("Ärger über Öl", ["ärger ÜBER das öl"], 6 / 7),  # letters beyond a to z are letters
        ("红色的车", ["红车"], 2 / 3),
    ],
)
def test_rouge_l(answer, references, expected):
    assert rouge_l(answer, references) == pytest.approx(expected)
