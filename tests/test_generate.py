"""What is said beside an answer, and what the last lines of a run say."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest

from sparsecut_jax.config import Config
from sparsecut_jax.generate import notes
from sparsecut_jax.inference.engine import Answer
from sparsecut_jax.runs.run import _fresh_fusion
from sparsecut_jax.runs.workdir import print_written
from sparsecut_jax.settings import InitConfig

PARAMS = {"fusion": {"main": {"kernel": 0}}, "llm": {"head": 0}}


def test_notes():
    run = SimpleNamespace(workdir="runs/x", fresh_fusion=False)
    assert notes(run, True, Answer("red", cut=False), 8) == []
    assert notes(run, True, Answer("", cut=False), 8) == ["the answer is empty: the model ended it at once"]
    assert notes(run, True, Answer("red and", cut=True), 8) == ["the answer was cut at --max_new_tokens=8"]
    fresh = SimpleNamespace(workdir="runs/x", fresh_fusion=True)
    assert notes(fresh, False, Answer("red", cut=False), 8) == []
    (note,) = notes(fresh, True, Answer("red", cut=False), 8)
    assert note.startswith("the fusion of runs/x was never trained") and "--config.init_from=runs/x" in note


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        ("converted", {}, True),
        ("converted", {"init": InitConfig(fusion="projector.safetensors")}, False),
        ("converted", {"init": InitConfig(model="whole")}, False),
        ("align", {}, False),
        ("align", {"init_from": "runs/other"}, False),
    ],
)
def test_a_fusion_that_nothing_has_trained(stage, changes, expected):
    assert _fresh_fusion(dataclasses.replace(Config(), **changes), stage, PARAMS) == expected


def test_a_fusion_is_fresh_until_a_stage_trains_it():
    cfg = Config().with_stage("align", trainable=("llm/.*",))
    assert _fresh_fusion(cfg, "align", PARAMS)
    assert not _fresh_fusion(cfg, "instruct", PARAMS)


def test_the_last_lines_ask_as_a_shell_takes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("answers.jsonl", "tensorboard"):
        (tmp_path / name).touch()
    print_written(str(tmp_path), 3.2, "what's red?", ["my pictures/a.png"])
    assert capsys.readouterr().out == (
        f"\nwritten to {tmp_path} in 3 s:\n"
        "  answers.jsonl     every test question with its references and the model's answer\n"
        f'  tensorboard       the same for TensorBoard: tensorboard --logdir={tmp_path} (after pip install tensorboard, the extra "loggers")\n'
        f"\nask it:  python -m sparsecut_jax.generate --workdir={tmp_path} --image='my pictures/a.png' "
        """--prompt='what'"'"'s red?'\n"""
    )
