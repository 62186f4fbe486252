"""Finds config files: those that --config names, and those that they import with `from configs import base`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

from sparsecut_jax.types import UserError


def shipped() -> str:
    """Folder of the configs that come with this package: inside it where it is installed, beside it in a checkout."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    inside = os.path.join(package, "configs")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), "configs")


def find(path: str) -> str:
    """The file that --config=`path` names: `path` itself or, for a configs/NAME.py that is not here, the shipped one.

    Raises:
      UserError: there is no such file.
    """
    if os.path.isdir(path):
        raise UserError(f"config file {path!r} is a folder; expected a Python file")
    if os.path.isfile(path):
        return path
    folder, name = os.path.split(path)
    if folder == "configs" and os.path.isfile(os.path.join(shipped(), name)):
        return os.path.join(shipped(), name)
    near = shipped() if folder == "configs" and not os.path.isdir(folder) else folder or "."
    known = sorted(f for f in os.listdir(near) if f.endswith(".py")) if os.path.isdir(near) else []
    listing = f"; {folder or '.'} has {', '.join(known)}" if known else ""
    raise UserError(f"config file {path!r} does not exist{listing}")


def provide_siblings(file: str) -> None:
    """Makes `from configs import NAME` find NAME.py in the folder of the config `file`, else among the shipped configs.

    No other package of that name is considered, whatever the current folder.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
    spec.submodule_search_locations = [os.path.dirname(os.path.abspath(file)), shipped()]
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
