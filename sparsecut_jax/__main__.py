"""Lists the commands.

python -m sparsecut_jax
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from sparsecut_jax.types import nearest

COMMANDS = ("train", "evaluate", "compare", "lab", "generate", "convert", "data", "plan", "benchmark")


def listing() -> str:
    """The commands, one line each, and where to start."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "Train, evaluate and run vision-language models with sparse shortcuts. Commands:",
            "",
            *(f"  python -m sparsecut_jax.{name:<{width}}  {summary(name)}" for name in COMMANDS),
            "",
            "Every command has --help. A first run, in under a minute:",
            "",
            "  python -m sparsecut_jax.train --config=configs/base.py:smoke",
        ]
    )


def summary(name: str) -> str:
    """The first sentence of a command's docstring; nothing is imported."""
    spec = importlib.util.find_spec(f"sparsecut_jax.{name}")
    path = Path(spec.origin)
    path = path.parent / "__main__.py" if path.name == "__init__.py" else path
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0].split(". ")[0].rstrip(".")


def run() -> None:
    """The command: ends with exit code 2 if given anything but --help."""
    given = sys.argv[1:]
    if not given or given[0] in ("--help", "-help", "-h"):
        print(listing())
        return
    word = given[0]
    if word in COMMANDS:
        sentence = f"the command is: python -m sparsecut_jax.{word}"
    else:
        sentence = f"{word!r} is not a command{nearest(word, COMMANDS)}; python -m sparsecut_jax lists them"
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run()
