"""answers.jsonl: every question of a test with its reference answers and the model's."""

from __future__ import annotations

import dataclasses
import json
import os

from sparsecut_jax.types import Answered, UserError


def write_answers(folder: str, answered: list[Answered]) -> str:
    """Writes answers.jsonl and returns its path. Answers to other tests are kept if they are from the same step."""
    path = os.path.join(folder, "answers.jsonl")
    step, tests = {item.step for item in answered}, {item.test for item in answered}
    others = []
    if os.path.exists(path):
        try:
            others = [item for item in read_answers(path) if item.step in step and item.test not in tests]
        except UserError:  # from an earlier version, or damaged: it is replaced
            others = []
    with open(path + ".tmp", "w") as file:
        file.writelines(json.dumps(vars(item)) + "\n" for item in (*others, *answered))
    os.replace(path + ".tmp", path)
    return path


def read_answers(path: str) -> list[Answered]:
    """Raises UserError naming the first line that is not an answer."""
    answers = []
    with open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
                item = Answered(**{field.name: fields[field.name] for field in dataclasses.fields(Answered)})
                answers.append(dataclasses.replace(item, images=tuple(item.images), references=tuple(item.references)))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} line {number} is not in the format that `evaluate` writes ({error!r:.100}); run "
                    "`python -m sparsecut_jax.evaluate` again"
                ) from None
    return answers
