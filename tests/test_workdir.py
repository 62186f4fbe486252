"""Folders that are given as a workdir and hold no run: what to type instead."""

import json

import pytest

from sparsecut_jax.runs.checkpoint import open_run
from sparsecut_jax.runs.workdir import locked, no_run
from sparsecut_jax.types import UserError

LAYOUTS = {
    "model": {"model_type": "sparsecut", "text_config": {}, "vision_config": {}},
    "llm": {"model_type": "llama", "vocab_size": 320},
    "vision": {"model_type": "clip_vision_model"},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_exported_model_is_named_with_the_command_that_makes_a_run_of_it(tmp_path, kind):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LAYOUTS[kind]))
    what = "is a model in Hugging Face layout, not a run"
    with pytest.raises(UserError) as caught:
        open_run(str(folder))
    assert str(caught.value) == (
        f"workdir '{folder}' {what}; make one of it: python -m sparsecut_jax.convert from-hf --{kind}={folder} "
        f"--out={folder}_run, then --workdir={folder}_run"
    )
    expected = f"config.init_from='{folder}' {what}; give it as --config.init.{kind} instead"
    assert no_run(str(folder), "config.init_from") == expected
    with pytest.raises(UserError) as caught, locked(str(folder)):
        pass
    assert str(caught.value) == (
        f"config.workdir='{folder}' is a model in Hugging Face layout; choose another folder, and start from the model "
        f"with --config.init.{kind}={folder}"
    )


def test_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/base/checkpoints/12", "runs/smoke/checkpoints", "runs/plan", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "runs/plan/config.json").write_text('{"seed": 0}')
    assert no_run("runs/bse") == "workdir 'runs/bse' does not exist; did you mean 'base'?; runs has base"
    assert no_run("nowhere/a") == "workdir 'nowhere/a' does not exist"
    assert no_run("runs/base/checkpoints/12") == (
        "workdir 'runs/base/checkpoints/12' is inside a run; give its workdir, runs/base"
    )
    assert no_run("adapter").startswith("workdir 'adapter' holds adapters alone; ")
    expected = "holds no checkpoint; expected a folder that sparsecut_jax.train or convert from-hf has written"
    assert no_run("runs/plan") == f"workdir 'runs/plan' {expected}"
    assert no_run("runs/smoke") == f"workdir 'runs/smoke' {expected}"
