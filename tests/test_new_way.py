"""docs/new_way.md: its files are written beside the package, its test passes, and the real commands know the new way."""

import json
import re
import subprocess
import sys

import pytest

from runs import ROOT

PAGE = (ROOT / "docs/new_way.md").read_text()
# A process whose package has the files of a folder, too; then a module is run like `python -m`.
RUN = """
import runpy, sys
folder = sys.argv.pop(1)
from sparsecut_jax.models import fusing, injecting
fusing.__path__.append(folder + "/sparsecut_jax/models/fusing")
injecting.__path__.append(folder + "/sparsecut_jax/models/injecting")
name = sys.argv.pop(1)
sys.path.insert(0, "tests")
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""
SMALL = (
    "--config.vision.layers=3", "--config.llm.layers=5", "--config.run_stages=('instruct',)",
    "--config.stages.instruct.max_steps=2", "--config.data.scenes.train=200", "--config.data.scenes.test=10",
    "--config.eval.every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files: every heading that ends with a path has its code below it."""
    folder = tmp_path_factory.mktemp("page")
    files = re.findall(r"^## [^\n]*: (\S+\.py)\n\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert [path for path, _ in files] == [
        "sparsecut_jax/models/fusing/blend.py", "sparsecut_jax/models/injecting/gated_add.py", "configs/blend.py",
        "tests/test_blend.py",
    ]  # fmt: skip
    for path, text in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def run(folder, module: str, *args: str) -> str:
    full = [sys.executable, "-c", RUN, str(folder), module, *args]
    done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_test_of_the_page(folder):
    passed = run(folder, "pytest", "-q", "-n0", "-p", "no:cacheprovider", f"{folder}/tests/test_blend.py")
    assert "2 passed" in passed


def test_the_commands_of_the_page(folder):
    """Trained, exported and read back, with its own setting."""
    workdir = f"--workdir={folder}/run"
    told = run(folder, "sparsecut_jax.train", f"--config={folder}/configs/blend.py:smoke", *SMALL, workdir)
    assert "injected by 'gated_add'" in told
    assert re.search(r"source +blend  blend\n +LLM layer \(of 5\) +2 +4\n", told)
    run(folder, "sparsecut_jax.convert", "to-hf", workdir, f"--out={folder}/out", "--verify")
    config = json.loads((folder / "out/config.json").read_text())
    assert config["fusion"]["blend"] == {"every": 2}
    loaded = run(folder, "sparsecut_jax.convert", "from-hf", f"--model={folder}/out", f"--out={folder}/again")
    assert "loaded     fusion: 6 arrays" in loaded
    shown = run(folder, "sparsecut_jax.train", f"--config={folder}/configs/blend.py", "--help=config.fusion.blend")
    assert "--config.fusion.blend.every=2  (int)\n      LLM layers from one entry to the next." in shown
