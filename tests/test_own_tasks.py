"""A task that nothing but its own file knows: trained, resumed, tested and exported by the real commands."""

import json
import re
import subprocess
import sys

import pytest

from runs import ROOT, draw_rows, small, write_config

TASK = '''
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparsecut_jax.models.layers import Linear
from sparsecut_jax.models.slots import read_slots
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.settings import setting
from sparsecut_jax.tasks import answers as by_text
from sparsecut_jax.types import BadSample, Extra, UserError

HOW = "by the first letter"
SCORES, SHARES = {"initial": "first letter"}, ("initial",)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A shade, from 0, is told from the image's positions in the LLM, besides the answers."""

    shades: int = setting(4, "Number of shades.")
    weight: float = setting(0.5, "Weight of the shades' cross-entropy.")


def check(settings, cfg):
    if settings.shades < 2:
        raise UserError(f"config.task.shade.shades={settings.shades}: expected at least 2")


def extras(settings, cfg):
    return {"shade": Extra((), "int32")}


def encode(settings, row, conversation):
    if not 0 <= row.get("shade", -1) < settings.shades:
        raise BadSample("format", f"key 'shade' must be a number from 0 to {settings.shades - 1}")
    example = conversation(row)
    return dataclasses.replace(example, extras={"shade": [np.int32(row["shade"])] * len(example.image_start)})


class Model(SparseCut):
    def setup(self):
        super().setup()
        self.task = Linear(self.task_settings.shades, ("embed", None))

    def loss(self, batch, chunk):
        total, count, seen = super().loss(batch, chunk)
        hidden, _, _ = self.hidden(batch)
        logits = self.task(read_slots(hidden, batch.image_start, self.wiring.positions).mean(2)).astype(jnp.float32)
        shade = batch.extras["shade"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(shade, 0)[..., None], -1)[..., 0]
        return total + self.task_settings.weight * jnp.where(shade >= 0, nll, 0).sum(), count, seen


def scores_of(answered):
    return {"initial": float(answered.answer[:1] == answered.expected[:1])}


def limit(settings, engine, rows):
    return 3


def answers(settings, engine, asked, views, limit):
    return by_text.answers(None, engine, asked, views, limit)
'''
RUN = """
import sys
from sparsecut_jax import tasks
tasks.__path__.append(sys.argv.pop(1))
import importlib
importlib.import_module("sparsecut_jax." + sys.argv.pop(1)).run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks").mkdir()
    (folder / "tasks/shade.py").write_text(TASK)
    path = draw_rows(folder)
    rows = json.loads(path.read_text())
    for i, row in enumerate(rows):
        row["shade"] = i % 4
    del rows[3]["shade"]
    path.write_text(json.dumps(rows))
    config = small(folder, folder / "run")
    config.task.name = "shade"
    for stage in config.stages.values():
        stage.trainable = ("fusion/.*", "task/.*")
    config.run_stages = ("instruct",)
    text = write_config(folder / "config.py", config).read_text()
    whole = "    from sparsecut_jax import config\n    whole = config.default()\n    whole.update(walk(tree))\n    return whole\n"
    (folder / "config.py").write_text(
        text.replace("    return ConfigDict(walk(tree))\n", whole)
    )  # with the task's group
    return folder


def command(folder, name: str, *args: str) -> subprocess.CompletedProcess:
    full = [sys.executable, "-c", RUN, str(folder / "tasks"), name, *args]
    return subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def trained(folder):
    """The output of training with settings of the task's own."""
    done = command(folder, "train", f"--config={folder}/config.py", "--config.task.shade.weight=2")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_trains_and_counts_its_own_scores(folder, trained):
    """Its own part in the start table, its own kind of broken row, its own scores."""
    assert re.search(r"task +68 +float32", trained)  # 16 * 4 + 4
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm_by_part"]["task"] > 0 for line in metrics if "loss" in line)
    assert "by the first letter; 95 % intervals in ()" in trained
    results = json.loads((folder / "run/results.json").read_text())
    assert results["rows/holdout/count"] == 16 and 0 <= results["rows/holdout/initial"] <= 1
    assert not any(key.endswith("/accuracy") for key in results)
    assert results["bad_samples"] == {"format": 1}
    bad = (folder / "run/bad_samples.jsonl").read_text()
    assert "key 'shade' must be a number from 0 to 3" in bad


def test_export_and_reload(folder, trained):
    done = command(folder, "convert", "to-hf", f"--workdir={folder}/run", f"--out={folder}/out", "--verify")
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "out/config.json").read_text())
    assert config["task"] == {"name": "shade", "shade": {"shades": 4, "weight": 2.0}}
    assert "arrays bit by bit, logits on a built-in batch differ by at most 0" in done.stdout
    done = command(folder, "convert", "from-hf", f"--model={folder}/out", f"--out={folder}/again")
    assert done.returncode == 0, done.stderr
    assert "loaded     task: 2 arrays, 68 parameters" in done.stdout


def test_bad_settings(folder):
    for args, sentence in (
        (["--config.task.shade.shades=1"], "config.task.shade.shades=1: expected at least 2"),
        (["--config.task.name=answers", "--config.task.shade.weight=1"], "config.task.shade.weight=1.0 has no effect"),
        (
            ["--config.task.name=shape"],
            "config.task.name='shape': expected one of answers, shade; did you mean 'shade'?",
        ),
    ):
        done = command(folder, "train", f"--config={folder}/config.py", *args)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
