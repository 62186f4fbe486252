"""Where --config finds files, and what `from configs import ...` in them means, from any folder."""

import os
import re
import sys

import pytest

import runs
from sparsecut_jax.commandline import cli, config_files
from sparsecut_jax.types import UserError

OWN = """
from sparsecut_jax.config import default

def get_config():
    config = default()
    config.workdir = "runs/own_base"
    return config
"""
IMPORTS = """
from configs import base

def get_config():
    return base.get_config()
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without configs, to be in; what is imported as `configs` is as before in the end."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "configs"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    sys.modules.update(kept)


def loaded(monkeypatch, file: str, *overrides: str):
    """What a command gets as --config, flags parsed anew."""
    flag_values = cli.flags.FlagValues()
    monkeypatch.setattr(cli.flags, "FLAGS", flag_values)
    monkeypatch.setattr("sys.argv", ["command", f"--config={file}", *overrides])
    cli.config_flags.DEFINE_config_file("config", None, "", flag_values=flag_values)
    cli.flags.DEFINE_boolean("print_config", False, "", flag_values=flag_values)
    cli._parse()
    return cli.typed_config()


def test_a_shipped_config_from_any_folder(elsewhere, monkeypatch, capsys):
    """By its path, and by the name that it has in the project; the latter says which file it is."""
    shipped = f"{runs.ROOT}/configs/scenes.py"
    assert loaded(monkeypatch, f"{shipped}:smoke").workdir == "runs/scenes_smoke"
    assert capsys.readouterr().err == ""
    cfg = loaded(monkeypatch, "configs/scenes.py:smoke", "--config.seed=7")
    assert (cfg.workdir, cfg.data.source, cfg.vision.width, cfg.seed) == ("runs/scenes_smoke", "scenes", 64, 7)
    said = f"configs/scenes.py is not in this folder; using the one that comes with sparsecut_jax, {shipped}\n"
    assert capsys.readouterr().err == said


def test_what_is_here_comes_before_what_is_shipped(elsewhere, monkeypatch, capsys):
    os.mkdir("configs")
    (elsewhere / "here/configs/base.py").write_text(OWN)
    assert loaded(monkeypatch, "configs/base.py").workdir == "runs/own_base"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("sibling", [True, False])
def test_imports_find_the_sibling_and_then_the_shipped(elsewhere, monkeypatch, sibling):
    """Another package of that name comes first on the path, and is not considered."""
    decoy = elsewhere / "decoy" / "configs"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("")
    (decoy / "base.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.syspath_prepend(str(decoy.parent))
    own = elsewhere / "own"
    own.mkdir()
    (own / "file.py").write_text(IMPORTS)
    if sibling:
        (own / "base.py").write_text(OWN)
    cfg = loaded(monkeypatch, f"{own}/file.py")
    assert (cfg.workdir, cfg.data.shift) == (("runs/own_base", 0) if sibling else ("runs/base", 2))


def test_a_file_that_is_nowhere(elsewhere):
    near = re.escape("config file 'configs/bse.py' does not exist; configs has base.py, fusion.py, lab.py, llava.py")
    with pytest.raises(UserError, match=near):
        config_files.find("configs/bse.py")
    for path in ("base.py", "other/base.py", f"{elsewhere}/configs/base.py"):  # only configs/NAME.py is a shipped name
        with pytest.raises(UserError, match=f"^config file '{path}' does not exist$"):
            config_files.find(path)
    with pytest.raises(UserError, match="config file '..' is a folder; expected a Python file"):
        config_files.find("..")
