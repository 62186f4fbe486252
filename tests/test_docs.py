"""Files, modules, flags and settings that documentation, docstrings and errors name exist."""

import ast
import dataclasses
import importlib.util
import re
import typing

from runs import ROOT
from sparsecut_jax import config
from sparsecut_jax.config import Config

PACKAGE = ROOT / "sparsecut_jax"
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb")]
PROGRAMS = [*ROOT.glob("configs/*.py"), *ROOT.glob("docs/*.py"), *PACKAGE.glob("**/*.py")]


def texts(files) -> dict[str, str]:
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def strings(program: str) -> str:
    """Its docstrings, errors and other strings, one after the other; those with values in them in pieces."""
    nodes = (node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant))
    return "\n".join(node.value for node in nodes if isinstance(node.value, str))


WRITTEN = texts([*PAGES, *ROOT.glob("launch/*")]) | {f: strings(text) for f, text in texts(PROGRAMS).items()}
FOLDERS = [file.name for root in (ROOT, PACKAGE) for file in root.iterdir() if file.is_dir() and file.name[0] != "."]
FILE = rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w/.]*?\w+\.(?:py|sh|yaml|md|ipynb|json|png))\b"
NO_FILE = r"runs/.*(?<!\.py)|.*/(NAME|mine|(test_)?blend|gated_add)\.py"  # what a run and the reader of a page write
MODULE = r"(?<![\w./])sparsecut_jax\.([a-z]\w*(?:\.[a-z]\w*)*)"
GROUPS = "|".join(field.name for field in dataclasses.fields(Config))
KEYS = r"((?:[a-z]\w*|\*)(?:\.(?:[a-z]\w*|\*))*)"
SETTING = rf"(?<![\w.])config\.{KEYS}"
SHORT = rf"`((?:{GROUPS})\.[\w.*]+)(?:=[^`\n]*)?`"
COMMAND = r"python -m sparsecut_jax\.([\w.]+)((?:[^\n#`|;]|\\\n)*)"


def found(pattern: str, written: dict[str, str]) -> list[tuple[str, str]]:
    """(file, what the pattern's first group matches), each once."""
    return sorted({(file, match[1]) for file, text in written.items() for match in re.finditer(pattern, text)})


def test_files_exist():
    """By their place in the project, or in the package."""
    names = [(file, name) for file, name in found(FILE, WRITTEN) if not re.fullmatch(NO_FILE, name)]
    assert ("docs/step.md", "models/attention.py") in names
    assert [(file, name) for file, name in names if not ((ROOT / name).exists() or (PACKAGE / name).exists())] == []


def test_modules_exist():
    names = found(MODULE, texts(PAGES))
    assert ("README.md", "train") in names
    public = importlib.import_module("sparsecut_jax").__all__
    missing = [
        each for each in names if each[1] not in public and not importlib.util.find_spec(f"sparsecut_jax.{each[1]}")
    ]
    assert missing == []


def test_imports_exist():
    """Of the programs beside the pages."""
    nodes = [node for text in texts(ROOT.glob("docs/*.py")).values() for node in ast.walk(ast.parse(text))]
    modules = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("sparsecut_jax")]
    assert len(modules) > 1
    names = [(node.module, alias.name) for node in modules for alias in node.names]
    assert [each for each in names if not hasattr(importlib.import_module(each[0]), each[1])] == []


def is_setting(path: str) -> bool:
    """Whether there is such a setting, group or property; `*` and what a config file names are any stage or source."""
    kind = Config
    for key in path.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind) and key in (hints := typing.get_type_hints(kind)):
            kind = hints[key]
        else:
            of_group = ("update", "values")  # methods of ConfigDict
            return isinstance(getattr(kind, key, None), property) or key in of_group
    return True


def test_settings_exist():
    names = found(SETTING, WRITTEN) + found(SHORT, texts(PAGES))
    expected = {
        ("docs/data.md", "stages.*.batching"),
        ("docs/data.md", "data.threads"),
        ("sparsecut_jax/checks.py", "lora.rank"),
    }
    assert expected <= set(names)
    others = ("json", "py", "a.b", *vars(config))  # config.json, config.py and what is in it; a made-up one
    others += ("fusion.blend", "fusion.blend.every")  # of docs/new_way.md
    assert [(file, name) for file, name in names if not is_setting(name) and name not in others] == []


def flags_of(command: str) -> set[str]:
    """Flags that the command's file defines, or that several commands share."""
    files = [PACKAGE / f"{command.replace('.', '/')}{end}" for end in (".py", "/__main__.py")]
    files = [*filter(lambda file: file.exists(), files), PACKAGE / "commandline/cli.py", PACKAGE / "runtime/hosts.py"]
    return {name for file in files for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', file.read_text())} | {"help"}


def test_flags_exist():
    used = {
        (file, match[1], flag.replace("-", "_"))
        for file, text in WRITTEN.items()
        for match in re.finditer(COMMAND, text)
        for flag in re.findall(r"--([a-z][\w-]*)", match[2])
    }
    assert ("README.md", "convert", "verify") in used
    assert [(file, name, flag) for file, name, flag in sorted(used) if flag not in flags_of(name)] == []
