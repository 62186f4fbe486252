"""Answers the test rows of a run, prints the scores, and writes every answer."""

from __future__ import annotations

from sparsecut_jax.data.parts import Part
from sparsecut_jax.evaluation import scores, testing
from sparsecut_jax.evaluation.answered import write_answers
from sparsecut_jax.inference.engine import Engine
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import hosts
from sparsecut_jax.runtime.progress import Progress
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.tasks.registry import Task, task_of
from sparsecut_jax.types import Answered, UserError, shown

SAMPLES = 12
WIDEST = 60  # characters of a cell in the table of samples


def report_accuracy(run: Run, tests: dict[str, Part], folder: str) -> dict[str, float | int | list[float]]:
    """Answers all test rows, prints scores by kind and samples, writes every answer to answers.jsonl in `folder`.

    Returns what results.json holds.
    """
    answered: list[Answered] = []
    results: dict[str, float | int | list[float]] = {}
    task = task_of(run.config)
    engine = Engine(run, rows=testing.ROWS_AT_ONCE, size=run.config.eval.batch_size)
    for test, part in tests.items():
        limit = task.limit(engine, testing.rows_of(part))
        progress, found, broken = Progress(len(part), 0, f"rows of {test}"), [], []
        answers = testing.answer_part(engine, task, part, test, limit)
        for some in progress.awaiting("answering the first rows, compilation included", answers):
            found += some.answered
            broken += some.broken
            progress.update(some.rows)
        progress.close()
        if not found:
            reason = (
                f"can be read: {broken[0]}"
                if broken
                else 'has a question to ask: their first answers have "loss": false'
            )
            raise UserError(f"none of the {len(part)} rows of {test} {reason}")
        results |= report(test, found, limit, task)
        if broken:
            print(
                f"left out   {len(broken):,} of {len(part):,} rows of {test}, which are broken; the first: {broken[0]}"
            )
            results[f"{test}/broken_rows"] = len(broken)
        answered += found
    print()
    some = testing.samples(answered, SAMPLES)
    rows = [[*map(_cell, (a.question, a.expected, a.answer)), _verdict(a)] for a in some]
    print(table(["sample question", "expected", "answered", ""], rows), flush=True)
    if hosts.first():
        write_answers(folder, answered)
    return results


def report(test: str, answered: list[Answered], limit: int, task: Task) -> dict[str, float | int | list[float]]:
    """Prints the scores of a test as a table by kind; returns them as results.json holds them."""
    groups = scores.summarize(answered, task)
    names = [name for name in task.scores if name in groups[""]]
    rows = [
        [group or "all", f"{scores.count(found):,}", *(str(found.get(name, "")) for name in names)]
        for group, found in groups.items()
    ]
    print(f"\n{test}: {task.module.HOW}; 95 % intervals in ()")
    print(table(["kind", "questions", *(task.scores[name] for name in names)], rows))
    cut = sum(item.cut for item in answered)
    if cut:
        print(
            f"cut        {cut:,} of {len(answered):,} answers were cut at {limit} tokens (config.eval.max_new_tokens, "
            "--max_new_tokens of evaluate)"
        )
    return {**scores.results(test, groups), f"{test}/cut": cut}


def _cell(text: str) -> str:
    """A text on one line, its end cut off where it is long; answers.jsonl has all of it."""
    line = shown(text)
    return line if len(line) <= WIDEST else f"{line[: WIDEST - 4]} ..."


def _verdict(item: Answered) -> str:
    return ", ".join([*["wrong"] * (not item.correct), *["cut"] * item.cut])
