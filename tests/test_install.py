"""What `pip install .` brings: packages, commands, requirements. Read from the files; .ci/run installs for real."""

import ast
import functools
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import sparsecut_jax
from runs import ROOT, draw_rows, with_devices

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
# What tests take if it is there (pytest.importorskip).
ONLY_IF_THERE = {"onnxruntime"}


def name_of(requirement: str) -> str:
    """ "ml-collections" of "ml_collections>=1.1,<2"."""
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


@functools.cache
def required() -> dict[str, str]:
    """{distribution: its line in requirements.txt}."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {name_of(line): line for line in lines if line and not line.startswith("#")}


def imported(*folders: str) -> dict[str, str]:
    """{top-level module that is imported from elsewhere: a file that does}, functions' own imports included."""
    found = {}
    for file in (file for folder in folders for file in sorted((ROOT / folder).glob("**/*.py"))):
        if file.parent == ROOT / "tests/parity":  # scripts for an environment of their own
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0]: str(file.relative_to(ROOT)) for name in names}
    own = {"sparsecut_jax", "configs", *(file.stem for file in (ROOT / "tests").glob("*.py"))}
    return {name: file for name, file in found.items() if name not in own | set(sys.stdlib_module_names)}


@functools.cache
def distributions() -> dict[str, list[str]]:
    """{module: the installed distributions that hold it}."""
    return {module: [*map(name_of, names)] for module, names in metadata.packages_distributions().items()}


def test_what_is_imported_is_required():
    """An import is named in requirements.txt, or by an extra; that another package happens to bring it is not enough."""
    optional = {name_of(requirement) for extra in EXTRAS.values() for requirement in extra}
    missing = {
        module: file
        for module, file in imported("sparsecut_jax", "configs", "tests").items()
        if not {*distributions().get(module, [module])} & (required().keys() | optional) and module not in ONLY_IF_THERE
    }
    assert missing == {}
    brought = {*imported("sparsecut_jax", "configs")} - {"onnx"}
    assert {m for m in brought if not {*distributions()[m]} & required().keys()} == set()


def test_what_is_not_imported_says_why_it_is_required():
    used = {
        name for module in imported("sparsecut_jax", "configs", "tests") for name in distributions().get(module, [])
    }
    assert [line for name, line in required().items() if name not in used and "  # " not in line] == []


def test_the_one_list_is_read_by_the_package():
    assert PROJECT["project"]["dynamic"] == ["version", "dependencies"]
    assert SETUPTOOLS["dynamic"]["dependencies"] == {"file": "requirements.txt"}


def test_every_package_is_installed_and_nothing_else():
    """No folder of the project becomes a package of its own beside sparsecut_jax."""
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "sparsecut_jax").glob("**/*.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted([".".join(f.parts) for f in folders] + ["sparsecut_jax.configs"])
    assert SETUPTOOLS["package-dir"] == {"sparsecut_jax.configs": "configs"}


def test_every_file_of_a_package_is_installed():
    kept = [file for file in (ROOT / "sparsecut_jax").glob("**/*.*") if file.is_file() and file.suffix != ".pyc"]
    patterns = SETUPTOOLS.get("package-data", {}).get("*", [])
    assert [str(file) for file in kept if file.suffix != ".py" and not any(map(file.match, patterns))] == []


def test_every_command_is_a_script():
    """`sparsecut-NAME` is what `python -m sparsecut_jax.NAME` runs."""
    scripts = PROJECT["project"]["scripts"]
    folder = ROOT / "sparsecut_jax"
    commands = [
        file for file in [*folder.glob("*.py"), *folder.glob("*/__main__.py")] if "cli.run(" in file.read_text()
    ]
    expected = {}
    for file in (file for file in commands if file.parent != folder or file.stem != "__main__"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        name = file.parent.name if file.stem == "__main__" else file.stem
        expected[f"sparsecut-{name}"] = f"{module}:run"
        assert file.read_text().endswith('if __name__ == "__main__":\n    run()\n'), file
    assert scripts == expected
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert not inspect.signature(getattr(importlib.import_module(module), function)).parameters


def test_nothing_imports_a_command():
    """What two commands share stands in a module that both import; only programs know how a command starts and ends."""
    folder, found = ROOT / "sparsecut_jax", set()
    commands = {target.partition(":")[0] for target in PROJECT["project"]["scripts"].values()}
    for file in folder.glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                is_program = "cli.run(" in file.read_text()
                found |= {
                    (file.name, name)
                    for name in names & (commands if is_program else commands | {"sparsecut_jax.commandline.cli"})
                }
    assert found == set()


def test_commands_define_no_flags_until_they_are_run():
    """They are imported by one another, and by programs with flags of their own."""
    code = (
        "from absl import flags; import importlib, json, sys\n"
        "before = set(flags.FLAGS)\n"
        "[importlib.import_module(name) for name in json.loads(sys.argv[1])]\n"
        "print(json.dumps(sorted(set(flags.FLAGS) - before)))"
    )
    modules = [target.partition(":")[0] for target in PROJECT["project"]["scripts"].values()]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(modules)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert {"workdir", "config", "stage", "out", "source"} & set(json.loads(done.stdout)) == set()


def test_an_installed_command_finds_the_shipped_configs(tmp_path):
    """Files where pip puts them, started in an empty folder; a config, the config that it imports, worker processes."""
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    for package in SETUPTOOLS["packages"]:
        source = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        target = site / package.replace(".", "/")
        target.mkdir(parents=True)
        for file in source.glob("*.py"):
            shutil.copy(file, target)
    draw_rows(here)
    module, _, function = PROJECT["project"]["scripts"]["sparsecut-data"].partition(":")
    script = tmp_path / "sparsecut-data"  # as pip writes it
    script.write_text(
        f"import sys\nfrom {module} import {function}\n\nif __name__ == '__main__':\n    sys.exit({function}())\n"
    )
    args = ["speed", "--config=configs/own.py:source=rows.json,images=.", "--workers=1", "--seconds=0.1"]
    done = subprocess.run(
        [sys.executable, str(script), *args],
        cwd=here, env={**with_devices(1), "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    shipped = f"{site}/sparsecut_jax/configs/own.py"
    expected = f"configs/own.py is not in this folder; using the one that comes with sparsecut_jax, {shipped}\n"
    assert (done.returncode, done.stderr) == (0, expected)
    assert "tokens" in done.stdout


def test_the_version_stands_in_one_place():
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "sparsecut_jax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", sparsecut_jax.__version__)
