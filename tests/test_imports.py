"""Imports run one way: a package imports only what stands above it, and nobody imports a command."""

import ast
import itertools
from collections.abc import Iterator

from runs import ROOT

# From the ground up. A package or module imports only those before it, and its own.
FLOORS = (
    "types", "settings", "runtime", "text", "models", "tasks", "checks", "effects", "config", "data", "weights", "runs",
    "inference", "training", "exporting", "evaluation", "planning", "benchmarking", "commandline", "api",
)  # fmt: skip
FOLDER = ROOT / "sparsecut_jax"


def imports(file) -> Iterator[tuple[int, str]]:
    """(line, module or name in full) of what a file imports from the package, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("sparsecut_jax"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsecut_jax"):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_command(file) -> bool:
    """Whether it is a program: `python -m` runs it."""
    return 'if __name__ == "__main__":' in file.read_text()


def test_imports_run_one_way():
    wrong, commands = [], {".".join(f.relative_to(FOLDER).with_suffix("").parts): f for f in FOLDER.glob("**/*.py")}
    commands = {name.removesuffix(".__main__") for name, file in commands.items() if is_command(file)}
    for file in FOLDER.glob("**/*.py"):
        here = file.relative_to(FOLDER).with_suffix("").parts[0]
        for line, name in imports(file):
            parts = name.split(".")[1:]
            there, at = parts[0] if parts else "", f"{file.relative_to(ROOT)}:{line}"
            if {".".join(parts[:i]) for i in (1, 2, 3)} & commands - {"data", ""}:
                wrong.append(f"{at} imports a command, {name}")
            elif is_command(file) or file.name == "__init__.py" and file.parent == FOLDER:
                continue
            elif there not in FLOORS:
                wrong.append(f"{at} imports {name}, which has no place in FLOORS")
            elif FLOORS.index(there) > FLOORS.index(here):
                wrong.append(f"{at} imports {name}, which stands below {here}")
    assert wrong == []


def test_every_module_has_its_floor():
    """The root holds commands and ground modules; all else is in a package that FLOORS names."""
    folders = [f.name for f in FOLDER.iterdir() if (f / "__init__.py").exists()]
    modules = [f.stem for f in FOLDER.glob("*.py") if not is_command(f) and f.stem != "__init__"]
    assert sorted(itertools.chain(folders, modules)) == sorted(FLOORS)
