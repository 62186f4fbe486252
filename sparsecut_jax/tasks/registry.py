"""The contract of a task, every task found by its file name, and what a config asks of its own.

A task is a file `tasks/NAME.py`, chosen by `config.task.name`. What stands above the line is optional, the rest is required:

    class Settings            frozen dataclass: the settings of the group `config.task.NAME`
    check(settings, cfg)      raises UserError for values that can never work
    class Model(SparseCut)    the model, with a loss of its own (its method `loss`), and parts of its own in `self.task`
    extras(settings, cfg) -> {name: Extra}      arrays of a batch besides text and pictures
    encode(settings, row, conversation) -> Example      a row's text and its items of these arrays; conversation(row) gives
                                                the Example of a conversation alone. Raises BadSample.
    check_row(settings, row)                    raises BadSample for a test row that cannot be asked about
    limit(settings, engine, rows) -> int        longest answer to any of the rows of a test, in tokens
    ---
    HOW                       how it asks and counts, in a few words for the table of scores
    SCORES, SHARES            {key in results.json: title}, and the keys of those that are 0 or 1
    scores_of(answered) -> {key: float}         the scores that apply to one answer
    answers(settings, engine, asked, views, limit) -> [Answered]        by rows `asked` and their pictures, see types.AskedRow

A row is in the format of text/conversation.py, with whatever keys the task adds. `engine` is inference.engine.Engine.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from sparsecut_jax import settings, tasks
from sparsecut_jax.models import ways
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.text.conversation import Example, Row
from sparsecut_jax.types import Answered, AskedRow, Extra, UserError

REGISTRY = "registry"  # this file, the only one in tasks/ that is not a task


def _tasks() -> dict[str, ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(tasks.__path__) if module.name != REGISTRY)
    return {name: importlib.import_module(f"{tasks.__name__}.{name}") for name in names}


TASKS = _tasks()
_NAME = setting("answers", "Task that the model is trained for and tested on.")
TaskConfig = ways.with_groups(settings.TaskConfig, TASKS, [("name", Literal[tuple(TASKS)], _NAME)], "TaskConfig")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its settings: the functions of its file, and what stands in for those that it leaves out."""

    name: str = "answers"
    settings: Any = None

    @property
    def module(self) -> ModuleType:
        return TASKS[self.name]

    @property
    def scores(self) -> dict[str, str]:
        return self.module.SCORES

    def check(self, cfg: Config) -> None:
        self._call("check", None, cfg)

    def extras(self, cfg: Config) -> dict[str, Extra]:
        return self._call("extras", {}, cfg)

    def encode(self, row: Row, conversation: Callable[[Row], Example]) -> Example:
        return self.module.encode(self.settings, row, conversation) if self.encodes else conversation(row)

    @property
    def encodes(self) -> bool:
        """Whether the task turns rows into text itself."""
        return hasattr(self.module, "encode")

    def check_row(self, row: Row) -> None:
        self._call("check_row", None, row)

    def limit(self, engine: Any, rows: Iterable[Row]) -> int:
        return self._call("limit", 0, engine, rows)

    def answers(self, engine: Any, asked: list[AskedRow], views: np.ndarray, limit: int) -> list[Answered]:
        return self.module.answers(self.settings, engine, asked, views, limit)

    def _call(self, name: str, default: Any, *args: Any) -> Any:
        function = getattr(self.module, name, None)
        return default if function is None else function(self.settings, *args)


def task_of(cfg: Config) -> Task:
    """The task of a config."""
    return Task(cfg.task.name, ways.own_settings(cfg.task, cfg.task.name, TASKS))


def extras_of(cfg: Config) -> dict[str, Extra]:
    """{name: array of a batch}: what the config's way of fusing and its task read besides text and pictures."""
    question = ways.wiring_of(cfg).question
    asked = {"question": Extra((question,), "int32")} if question else {}
    return asked | task_of(cfg).extras(cfg)


def check(cfg: Config) -> None:
    """Raises UserError for settings with which the config's task can never work."""
    task = task_of(cfg)
    task.check(cfg)
    for name, extra in task.extras(cfg).items():
        for stage in cfg.run_stages:
            if extra.room and stage in cfg.stages and cfg.stages[stage].batching == "packed":
                raise UserError(
                    f"config.stages.{stage}.batching='packed': task {cfg.task.name!r} has {extra.room} {name} in a sequence, "
                    "however many rows that holds; expected rows or buckets"
                )


def build_model(cfg: Config, dtype: Any = jnp.float32, intermediates: tuple[str, ...] = ()) -> SparseCut:
    """The model of a config whose vocab_size is resolved.

    If the config is not resolved for a platform (runtime/backends.py), attention is "xla" and nothing is rematerialized.

    Raises:
      UserError: a wiring that is impossible.
    """
    task = task_of(cfg)
    return getattr(task.module, "Model", SparseCut)(
        cfg.vision,
        cfg.fusion,
        cfg.llm,
        ways.wiring_of(cfg),
        dtype,
        intermediates,
        "xla" if cfg.attention == "auto" else cfg.attention,
        cfg.lora,
        cfg.injecting,
        FrozenDict(extras_of(cfg)),
        task.settings,
    )
