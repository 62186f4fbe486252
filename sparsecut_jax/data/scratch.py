"""A folder for files that worker processes map, deleted after its process ends, even if that is killed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

PREFIX = "sparsecut_jax_scratch_"
LOCK = "in_use"


@functools.cache
def _folder() -> tuple[tempfile.TemporaryDirectory, int]:
    """The folder, and the handle of a file in it that is locked while this process lives."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_if_left(folder)
    folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    lock = os.path.join(folder.name, LOCK)
    handle = os.open(f"{lock}.new", os.O_CREAT | os.O_RDWR, 0o600)
    with contextlib.suppress(OSError):  # a network drive without locks: its folders are never considered abandoned
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.rename(f"{lock}.new", lock)  # locked before others can see it
    return folder, handle


def scratch() -> str:
    """The folder of this process, under TMPDIR. Folders left by killed processes are removed first."""
    return _folder()[0].name


def _remove_if_left(folder: Path) -> None:
    """Removes the folder of a killed process, whose lock nobody holds."""
    handle = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(handle)


class MappedArray:
    """An array that is passed to other processes as a file name."""

    def __init__(self, values: np.ndarray):
        handle, self.path = tempfile.mkstemp(suffix=".npy", dir=scratch())
        with os.fdopen(handle, "wb") as file:
            np.save(file, values)

    @functools.cached_property
    def values(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}
