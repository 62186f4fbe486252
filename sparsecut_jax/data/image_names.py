"""Locates the image of a row: a name in the source's folder, on a disk or gs://."""

from __future__ import annotations

import itertools
import os
import posixpath
import stat as stat_lib
from pathlib import Path

from etils import epath

from sparsecut_jax.types import BadSample

KINDS = {
    stat_lib.S_IFDIR: "a folder",
    stat_lib.S_IFIFO: "a named pipe",
    stat_lib.S_IFSOCK: "a socket",
    stat_lib.S_IFCHR: "a device",
    stat_lib.S_IFBLK: "a device",
}


def resolve(folder: str | os.PathLike, name: str, stat: bool = True, follow_links: bool = False) -> Path:
    """Path of image `name` in `folder`, which is on a disk or gs://... (where only names are checked).

    Args:
      stat: whether to check links and that the file exists; otherwise the disk is not accessed.
      follow_links: whether links inside the folder may lead out of it.

    Raises:
      BadSample: the path leaves the folder, does not exist, is not a file, or is not a valid file name.
    """
    place = os.fspath(folder)
    try:
        os.fsencode(name)
        possible = "\0" not in name
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise BadSample("path", f"image {name!r} in {place!r} is not a valid file name")
    if "://" in place:
        inner = posixpath.normpath(name)
        if inner == ".." or inner.startswith(("/", "../")) or "://" in name:
            raise BadSample("path", f"image {name!r} leaves its folder {place}")
        return epath.Path(place) / inner
    root = os.path.abspath(place)
    path = os.path.normpath(os.path.join(root, name))
    if not _within(root, path):
        raise BadSample("path", f"image {name!r} leaves its folder {root}")
    if not stat:
        return Path(path)
    real_root, real = os.path.realpath(root), os.path.realpath(path)
    if not follow_links and not _within(real_root, real):
        out = (link for link in _links(root, path) if not _within(real_root, os.path.realpath(link)))
        link = next(out, path)
        raise BadSample(
            "path",
            f"image {name!r} leaves its folder {root}: {link} is a link to {os.path.realpath(link)}; "
            "set config.data.follow_links=True (--follow_links of evaluate) to follow such links",
        )
    if not os.path.isfile(real):
        broken = next((link for link in _links(root, path) if not os.path.exists(link)), None)
        if broken:
            target = os.readlink(broken)
            raise BadSample("missing_image", f"image {path}: {broken} is a link to {target}, which does not exist")
        kind = what_else(real)
        raise BadSample("missing_image", f"image {real} {f'is {kind}, not a file' if kind else 'does not exist'}")
    return Path(real)


def what_else(path: str | os.PathLike) -> str:
    """What is at a path if it is not a file, such as "a folder"; "" for a file or nothing."""
    try:
        return KINDS.get(stat_lib.S_IFMT(os.stat(path).st_mode), "")
    except (OSError, ValueError):
        return ""


def _links(root: str, path: str) -> list[str]:
    """The links between a folder and a path in it."""
    parts = os.path.relpath(path, root).split(os.sep)
    return [at for at in itertools.accumulate(parts, os.path.join, initial=root) if at != root and os.path.islink(at)]


def _within(root: str, path: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))
