"""answers.jsonl: every question of a test with its reference answers and the model's."""

from __future__ import annotations

import dataclasses
import json
import os

from sparsecut_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question, its reference answers and the model's.

    Attributes:
      test: name of the test rows, as results.json has it.
      row: the row's id, or its number where it has none.
      images: paths of its images; None for an image that is not a file (TFDS).
      expected: the answer of the conversation.
      references: other correct answers, from `answers` of the row.
      cut: whether the answer was cut at the maximum length.
      step: step of the checkpoint.
    """

    test: str
    row: str
    kind: str
    question: str
    images: tuple[str | None, ...]
    expected: str
    references: tuple[str, ...]
    answer: str
    cut: bool
    step: int

    @property
    def correct(self) -> bool:
        """Whether the answer equals a correct answer exactly."""
        return self.answer == self.expected or self.answer in self.references


def write_answers(folder: str, answered: list[Answered]) -> str:
    """Writes answers.jsonl and returns its path. Answers to other tests are kept if they are from the same step."""
    path = os.path.join(folder, "answers.jsonl")
    step, tests = {item.step for item in answered}, {item.test for item in answered}
    kept = []
    if os.path.exists(path):
        try:
            kept = [item for item in read_answers(path) if item.step in step and item.test not in tests]
        except UserError:  # from an earlier version, or damaged: it is replaced
            kept = []
    with open(path + ".tmp", "w") as file:
        file.writelines(json.dumps(vars(item)) + "\n" for item in (*kept, *answered))
    os.replace(path + ".tmp", path)
    return path


def read_answers(path: str) -> list[Answered]:
    """Raises UserError naming the first line that is not an answer."""
    found = []
    with open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
                item = Answered(**{field.name: fields[field.name] for field in dataclasses.fields(Answered)})
                found.append(dataclasses.replace(item, images=tuple(item.images), references=tuple(item.references)))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} line {number} is not in the format that `evaluate` writes ({error!r:.100}); run "
                    "`python -m sparsecut_jax.evaluate` again"
                ) from None
    return found
