"""ROUGE-L, how much of a reference's word order an answer has."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

# Chinese and Japanese by character.
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), for the best-matching reference."""
    return _rouge().score_multi(references, answer)["rougeL"].fmeasure


@functools.cache
def _rouge():
    from rouge_score import rouge_scorer, tokenizers  # here: it takes a second

    class Words(tokenizers.Tokenizer):
        """Its own tokenizer drops all letters but a to z."""

        def tokenize(self, text: str) -> list[str]:
            return WORDS.findall(text.lower())

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
