"""Folders and JSON files that commands write."""

from __future__ import annotations

import json
import os

from sparsecut_jax.types import UserError


def make_folder(name: str, folder: str) -> str:
    """Creates `folder`, the value of the flag or setting `name`, and returns it. Call it before slow work starts.

    Raises:
      UserError: the folder cannot be written to, or is in a bucket.
    """
    if "://" in folder:
        raise UserError(f"{name}={folder!r}: expected a folder on a file system, not in a bucket")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}={folder!r} cannot be written to: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{name}={folder!r} cannot be written to: Permission denied")
    return folder


def write_json(path: str, values: dict) -> None:
    """Writes `values` as JSON, atomically."""
    with open(path + ".tmp", "w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)


def print_files(folder: str, what: dict[str, str]) -> None:
    """Lists those of the files that are there, each with what it holds."""
    for name, told in what.items():
        if os.path.exists(os.path.join(folder, name)):
            print(f"  {name:<17} {told}")
