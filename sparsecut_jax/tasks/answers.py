"""`answers`: questions about pictures, each answered in text.

Every question is asked on its own: all independent turns of a row, the first one of a conversation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from sparsecut_jax.text.conversation import IMAGE, Example, Request, Row, images_of
from sparsecut_jax.text.rouge import WORDS, rouge_l
from sparsecut_jax.text.vqa_rules import HUMANS, normalize, vqa_score
from sparsecut_jax.types import Answered, AskedRow, BadSample

HOW = "every question asked on its own; accuracy is exact match"
# Key in results.json -> what tables call it.
SCORES = {
    "accuracy": "accuracy",
    "normalized_accuracy": "normalized match",
    "vqa_accuracy": "VQA score",
    "rouge_l": "ROUGE-L",
}
SHARES = ("accuracy", "normalized_accuracy")  # means of zeros and ones
LONG = 5  # words that an expected answer needs for ROUGE-L to be meaningful
MOST_TOKENS = 512  # of an answer, unless a setting gives another number: the KV cache grows with it


def scores_of(item: Answered) -> dict[str, float]:
    """The scores that apply to one answer, each from 0 to 1.

    `vqa_accuracy` needs the answers of ten humans, `rouge_l` an expected answer of LONG words or more.
    """
    said, known = normalize(item.answer), {item.expected, *item.references}
    scores = {"accuracy": float(item.correct), "normalized_accuracy": float(said in map(normalize, known))}
    if len(item.references) == HUMANS:
        scores["vqa_accuracy"] = vqa_score(item.answer, item.references)
    if len(WORDS.findall(item.expected)) >= LONG:
        scores["rouge_l"] = rouge_l(item.answer, sorted(known))
    return scores


def asked_turns(row: Row) -> list[tuple[dict, dict]]:
    """The (human, gpt) pairs that are asked: all independent turns, the first one of a conversation; none whose answer
    has `"loss": false`."""
    pairs = list(zip(row["conversations"][::2], row["conversations"][1::2], strict=True))
    return [pair for pair in (pairs if row.get("independent") else pairs[:1]) if pair[1].get("loss", True)]


def references(row: Row, gpt: dict[str, Any]) -> tuple[str, ...]:
    """Correct answers besides that of the turn `gpt`: `answers` of the turn, or of a row with one question.

    Each is a string, or an object with a string "answer" as in the annotations of VQA v2. Raises BadSample.
    """
    asked = asked_turns(row)
    given = gpt.get("answers")
    if given is None:
        given = row.get("answers")
        if given is not None and len(asked) > 1:
            raise BadSample(
                "format", f"key 'answers' is ambiguous for {len(asked)} questions; move it into an answer turn"
            )
    if given is None:
        return ()
    texts = (
        [item.get("answer") if isinstance(item, dict) else item for item in given] if isinstance(given, list) else []
    )
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadSample("format", f"key 'answers' must be a list of strings, got {given!r:.100}")
    return tuple(text.strip() for text in texts)


def check_row(settings: None, row: Row) -> None:
    """Raises BadSample for wrong `answers`."""
    for _, gpt in asked_turns(row):
        references(row, gpt)


def limit(settings: None, engine: Any, rows: Iterable[Row]) -> int:
    """Maximum answer length in tokens: config.eval.max_new_tokens or, if that is 0, what the references of the rows need.

    That is 1.25 times the longest of them, to allow for other wordings, plus the end token, rounded up to a multiple of 8
    so that few programs are compiled; at most MOST_TOKENS.
    """
    run = engine.run
    if run.config.eval.max_new_tokens:
        return run.config.eval.max_new_tokens
    texts = set()
    for row in rows:
        with contextlib.suppress(BadSample):
            for _, gpt in asked_turns(row):
                texts |= {gpt["value"].strip(), *references(row, gpt)}
    longest = max((len(run.tokenizer.encode(engine.template.space + text)) for text in texts), default=0)
    return min(MOST_TOKENS, -(-(longest * 5 // 4 + 2) // 8) * 8)


def prompt_of(row: Row, human: dict, engine: Any) -> Example:
    """The prompt of one question, which the engine reads on its own."""
    shared = row.get("independent")  # images come before all questions, otherwise where this one has them
    images = len(images_of(row)) if shared else human["value"].count(IMAGE)
    return engine.prompt(text_of(human) if shared else human["value"], images, row.get("system", ""))


def text_of(human: dict) -> str:
    """A question without its images."""
    return human["value"].replace(IMAGE, "").strip()


def answers(settings: None, engine: Any, asked: list[AskedRow], views: np.ndarray, limit: int) -> list[Answered]:
    """The answers to all questions of some rows, by greedy decoding with up to `limit` tokens."""
    turns = [(row, *pair) for row in asked for pair in asked_turns(row.row)]
    requests = [Request(prompt_of(row.row, human, engine), row.place) for row, human, _ in turns]
    return [
        Answered(
            test=row.test,
            row=row.name,
            kind=gpt.get("kind", ""),
            question=text_of(human),
            images=row.images,
            expected=gpt["value"].strip(),
            references=references(row.row, gpt),
            answer=answer.text,
            cut=answer.cut,
            step=engine.run.step,
        )
        for (row, human, gpt), answer in zip(turns, engine.answers(views, requests, limit), strict=True)
    ]
