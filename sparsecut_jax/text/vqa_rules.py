"""Compares answers up to their spelling: the normalization of the VQA challenge, and its score.

The rules are those published at https://visualqa.org/evaluation.html: lower case; no periods except in decimals; number
words as digits; no articles; contractions with their apostrophe; punctuation other than apostrophe and colon becomes a
space, and a comma between digits disappears.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

HUMANS = 10  # answers to a question that the VQA score is defined for
AGREE = 3  # humans who must have given an answer for it to count in full
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}
# Those whose letters spell no other word, as "its", "well" and "were" do.
CONTRACTIONS = [
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd've", "he's", "how'd", "how'll", "how's", "i'd've", "i'm", "i've",
    "isn't", "it'd", "it'd've", "it'll", "let's", "ma'am", "might've", "mightn't", "mightn't've", "must've",
    "mustn't", "needn't", "o'clock", "oughtn't", "shan't", "she'd've", "she's", "should've", "shouldn't",
    "shouldn't've", "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll",
    "someone's", "something'd", "something'd've", "something'll", "that'd", "that'd've", "that'll", "that's",
    "there'd", "there'd've", "there're", "there's", "they'd", "they'd've", "they'll", "they're", "they've",
    "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd",
    "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll", "why're", "why's", "won't",
    "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll",
    "you're", "you've",
]  # fmt: skip


def _with_apostrophes() -> dict[str, str]:
    """Every contraction by its spellings with one or more apostrophes missing."""
    spellings = {}
    for word in CONTRACTIONS:
        parts = word.split("'")
        for marks in itertools.product(("", "'"), repeat=len(parts) - 1):
            spellings["".join(itertools.chain(*zip(parts, (*marks, ""), strict=True)))] = word
    return spellings


APOSTROPHES = _with_apostrophes()


def normalize(answer: str) -> str:
    """The answer as the VQA rules compare it: "The two dogs, I dont know." -> "2 dogs i don't know"."""
    text = answer.lower().replace("\u2019", "'")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s.':]|_", " ", text)
    words = (DIGITS.get(word, word) for word in text.split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(answer: str, humans: Sequence[str]) -> float:
    """min(1, n / 3) for n humans with this answer, the mean over all choices of all humans but one."""
    said = normalize(answer)
    same = [normalize(human) == said for human in humans]
    return sum(min(1.0, (sum(same) - one) / AGREE) for one in same) / len(same)
