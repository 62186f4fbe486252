"""The Python API on a tiny run: the answers of the command, from every kind of image; and the code of docs/api.md."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import sparsecut_jax
from runs import ROOT, draw_rows, each, small, write_config

QUESTION = "what color?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs/base, which is trained, exported to exported/, and picture.png; and what `generate` answers."""
    folder = tmp_path_factory.mktemp("api")
    draw_rows(folder)
    os.rename(folder / "1.png", folder / "picture.png")
    os.symlink("picture.png", folder / "1.png")
    config = small(folder, folder / "runs/base", set={"stages.instruct.max_steps": 30, "data.holdout": 0})
    asked = (f"--prompt={QUESTION}", f"--image={folder}/picture.png")
    said = each(
        ("train", f"--config={write_config(folder / 'config.py', config)}"),
        ("convert", "to-hf", f"--workdir={folder}/runs/base", f"--out={folder}/exported"),
        ("convert", "from-hf", f"--model={folder}/exported", f"--out={folder}/runs/again"),
        ("generate", f"--workdir={folder}/runs/base", *asked),
        ("generate", f"--workdir={folder}/runs/again", *asked),
    )
    assert [(code, err) for code, _, err in said] == [(0, "")] * 5
    assert said[3][1] == said[4][1] != "\n"
    return folder, said[3][1].strip()


@pytest.fixture(scope="module")
def models(trained):
    return [sparsecut_jax.load(trained[0] / name) for name in ("runs/base", "exported")]


def kinds(path):
    """The same image as everything that `answer` takes."""
    image = Image.open(path)
    with_alpha = image.convert("RGBA")
    return [str(path), path, path.read_bytes(), image, with_alpha, np.asarray(image), [path], (path,)]


def test_a_run_and_its_export_answer_as_the_command_does(trained, models):
    """Whatever the image comes as. The export says how the run was asked: its template is not the default one."""
    folder, expected = trained
    for model in models:
        assert model.config.stages["instruct"].template == "qa"
        assert {model.answer(QUESTION, image) for image in kinds(folder / "picture.png")} == {expected}
    text = [model.answer("is it red?", max_new_tokens=8) for model in models]
    drawn = [
        model.answer(QUESTION, folder / "picture.png", temperature=2.0, seed=7, template="vicuna_v1")
        for model in models
    ]
    assert text[0] == text[1] and drawn[0] == drawn[1] != expected


def test_the_prompt_that_an_export_names(trained):
    config = json.loads((trained[0] / "exported/config.json").read_text())
    assert (config["model_type"], config["prompt"]) == ("sparsecut", {"template": "qa", "max_images": 1})


WRONG = [
    (dict(images=["a.png", "b.png"]), "2 images given, but the model was trained with config.data.max_images=1"),
    (dict(images="a.png"), "image a.png does not exist"),
    (dict(images=b"<html>"), "image of 6 bytes cannot be read as an image: its format is unknown"),
    (dict(images=np.zeros((4, 4, 3))), r"an image is float64[4, 4, 3]; expected uint8[height, width, 3]"),
    (dict(images=np.zeros((4, 4), np.uint8)), r"an image is uint8[4, 4]; expected uint8[height, width, 3]"),
    (dict(images=""), "image '' does not exist"),
    (dict(images=None), "an image is a NoneType; expected a path, bytes, a PIL image or an array"),
    (dict(images=bytearray(b"GIF89a")), "an image is a bytearray; expected a path, bytes, a PIL image or an array"),
    (dict(images=(image for image in ())), "an image is a generator; expected a path, bytes, a PIL image or an array"),
    (dict(images=[3]), "an image is a int; expected a path, bytes, a PIL image or an array uint8[height, width, 3]"),
    (dict(max_new_tokens=0), "max_new_tokens=0: expected 1 to 100,000"),
    (dict(max_new_tokens=2.0), "max_new_tokens=2.0: expected 1 to 100,000"),
    (dict(prompt=None), "the prompt is a NoneType; expected a string"),
    (dict(temperature=-1.0), "temperature=-1.0: expected 0 or more"),
    (dict(seed=-1), "seed=-1: expected 0 to below 2^32"),
    (dict(template="vicuna"), "template='vicuna' is not known; did you mean 'vicuna_v1'?"),
]


@pytest.mark.parametrize("arguments, said", WRONG)
def test_what_cannot_be_asked(models, arguments, said):
    with pytest.raises(sparsecut_jax.UserError) as caught:
        models[0].answer(**{"prompt": QUESTION, **arguments})
    assert str(caught.value).startswith(said)


def test_loading_says_nothing(trained):
    """Neither of what is missing on this machine nor of an architecture that transformers does not know."""
    code = f"import sparsecut_jax; sparsecut_jax.load({str(trained[0] / 'exported')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_checkpoints_by_name(trained, models):
    best = sparsecut_jax.load(trained[0] / "runs/base", "best")
    assert best.run.step == models[0].run.step == 34
    assert sparsecut_jax.load(trained[0] / "runs/base", 34).run.step == 34


def test_what_cannot_be_loaded(trained, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base, exported = trained[0] / "runs/base", trained[0] / "exported"
    for path, checkpoint, said in [
        (
            trained[0] / "runs",
            "latest",
            f"{base.parent} has neither checkpoints/ (the workdir of a run) nor config.json",
        ),
        (base, "7", f"checkpoint '7' is not in {base}; expected latest, best or one of [34]"),
        (
            "runs/nowhere",
            "latest",
            "runs/nowhere is not a folder; expected the workdir of a run, or a folder written by convert",
        ),
        (tmp_path, "latest", f"{tmp_path} has no .safetensors file"),
        (exported, "best", f"{exported} is an exported model and has no checkpoint 'best'; leave `checkpoint` out"),
    ]:
        with pytest.raises(sparsecut_jax.UserError, match=re.escape(said)):
            sparsecut_jax.load(path, checkpoint)


def test_the_code_of_the_page(trained, monkeypatch, capsys):
    """Its blocks, one after the other, where runs/base and picture.png are."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(trained[0])
    exec("\n".join(blocks), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and len(set(lines[1:5])) == 1 and lines[6].startswith("runs/nothing is not a folder")


def test_the_import_is_cheap_and_names_what_there_is():
    """JAX is not imported before it is needed, from any folder."""
    code = "import sys, sparsecut_jax; print(sparsecut_jax.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{sparsecut_jax.__version__} False False\n"
    assert sorted(sparsecut_jax.__all__) == ["Model", "UserError", "load"]
    with pytest.raises(AttributeError, match="module 'sparsecut_jax' has no attribute 'laod'"):
        sparsecut_jax.laod  # noqa: B018
