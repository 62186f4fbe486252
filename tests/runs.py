"""A run small enough for a test: 24 drawn pictures, a tower of three blocks, an LLM of three layers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from sparsecut_jax import config as config_lib
from sparsecut_jax.runs.run import load_run
from sparsecut_jax.runtime import sharding

ROOT = Path(__file__).resolve().parents[1]
COLORS = ("red", "blue", "green", "yellow")


def draw_rows(folder: Path, count: int = 24) -> Path:
    """Pictures of one coloured square, two independent questions about each; returns the JSON file."""
    rows = []
    for i in range(count):
        color = COLORS[i % len(COLORS)]
        picture = Image.new("RGB", (32, 32), "white")
        x, y = 2 + 5 * (i % 4), 3 + 4 * (i % 5)
        ImageDraw.Draw(picture).rectangle((x, y, x + 9, y + 9), fill=color)
        picture.save(folder / f"{i}.png")
        turns = [("<image>\nwhat color?", color), ("\nis it red?", "yes" if color == "red" else "no")]
        conversation = []
        for question, answer in turns:
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "image": f"{i}.png", "independent": True, "conversations": conversation})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def draw_rows_behind_broken_ones(folder: Path, *names: str) -> Path:
    """`draw_rows`, with a row for each of `names` in front; "page.png" exists, but is no picture."""
    path = draw_rows(folder)
    (folder / "page.png").write_text("<html></html>")
    turns = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "red"}]
    faults = [{"id": name, "image": name, "conversations": turns} for name in names]
    path.write_text(json.dumps(faults + json.loads(path.read_text())))
    return path


def small(folder: Path, workdir: str | Path, **overrides) -> ConfigDict:
    """Config of the small run: 4 steps of captions, 8 of questions. Overrides are dotted keys with _ for dots' sake:
    a dict {"stages.instruct.lr": 1e-3} is given as keyword `set`."""
    config = config_lib.default()
    config.workdir = str(workdir)
    config.vision.update(image_size=16, patch_size=8, width=16, layers=3, heads=2, mlp_dim=32)
    config.llm.update(width=16, layers=3, heads=2, kv_heads=2, head_dim=8, mlp_dim=32)
    config.shortcuts.count = 2
    config.tokenizer.vocab_size = 300
    config.data.update(source=str(folder / "rows.json"), images=str(folder), holdout=8, threads=1)
    config.data.max_bad_fraction = 0.2
    for stage in config.stages.values():
        stage.update(trainable=("vision/.*", "fusion/.*", "llm/.*"), batch_size=8, lr=3e-3)
    config.stages.align.update(rows="captions", template="plain", seq_len=16, max_steps=4)
    config.stages.instruct.update(template="qa", seq_len=32, max_steps=8)
    config.eval.update(every=4, batch_size=16, max_new_tokens=3)
    config.checkpoint.every = 2
    config.log_every = 1
    for key, value in overrides.get("set", {}).items():
        *path, last = key.split(".")
        group = config
        for name in path:
            group = group[name]
        group[last] = value
    return config


def write_config(path: Path, config: ConfigDict) -> Path:
    """A config file that holds `config`, for the real commands."""
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n\n"
        "def get_config():\n"
        "    tuples = lambda x: tuple(map(tuples, x)) if isinstance(x, list) else x\n"
        f"    tree = json.loads({json.dumps(config.to_dict())!r})\n"
        "    walk = lambda x: {k: walk(v) for k, v in x.items()} if isinstance(x, dict) else tuples(x)\n"
        "    return ConfigDict(walk(tree))\n"
    )
    return path


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """The parameters of a run, by their path."""
    params = load_run(str(workdir), text=False).params
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_flatten_with_path(params)[0]}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def take_one_device(patch: pytest.MonkeyPatch) -> None:
    """Training in this process takes one of its eight devices: that compiles in a third of the time."""
    make_mesh = sharding.make_mesh
    patch.setattr(sharding, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1]))


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with that many fake devices."""
    return {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")}


def command(module: str, *args: str, devices: int = 1, **environment: str) -> subprocess.Popen:
    """Starts `python -m sparsecut_jax.MODULE ARGS` on that many fake devices, the environment changed as given."""
    return subprocess.Popen(
        [sys.executable, "-m", f"sparsecut_jax.{module}", *args],
        cwd=ROOT, env=with_devices(devices) | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


FORKS = """
import json, os, runpy, sys
import sparsecut_jax.train, sparsecut_jax.generate, sparsecut_jax.data.stats, sparsecut_jax.exporting.verify

for number, (module, *args) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = [module, *args]
        sys.modules.pop(f"sparsecut_jax.{module}", None)
        code = 0
        try:
            runpy.run_module(f"sparsecut_jax.{module}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        os._exit(code)  # at once: to take a forked Python apart takes longer than the command
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def each(*commands: Sequence[str]) -> list[tuple[int, str, str]]:
    """`finish` of commands (MODULE, *ARGS), one after the other; what they import is imported only once."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", FORKS, json.dumps(commands), folder],
            cwd=ROOT, env=with_devices(1), stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the command that hangs as well
        assert process.returncode == 0
        text = lambda name: Path(folder, name).read_text()
        return [(int(code), text(f"{i}.out"), text(f"{i}.err")) for i, code in enumerate(out.split())]
