"""Decompresses or recodes a file once into the scratch folder, so that it can be memory-mapped."""

from __future__ import annotations

import codecs
import dataclasses
import errno
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator

import pyarrow as pa
from etils import epath

from sparsecut_jax.data.kinds import CODECS, TEXTS, kind_of
from sparsecut_jax.data.scratch import scratch
from sparsecut_jax.types import UserError

BLOCK = 1 << 20
SAMPLES = 32
LAYERS = 4  # a tar in a gzip, with some margin


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file to read from.

    Attributes:
      path: what the user calls it.
      local: where its content is, as `kind` says.
      original: the file that `sampled` hashes; `local` may be derived from it.
      state: that of `local` when it was first opened.
    """

    path: str
    local: str
    kind: str
    original: str
    state: tuple[int, int]

    @classmethod
    def of(cls, path: str, local: str, kind: str, original: str = "") -> DataFile:
        return cls(path, local, kind, original or local, _state(os.stat(local)))

    def check(self, now: os.stat_result | None = None) -> None:
        """Raises UserError if the file has changed. `now`: of the file where it is open."""
        if _state(now or os.stat(self.local)) != self.state:
            raise UserError(f"data source {self.path!r} has changed since this run opened it; start again")

    def mapped(self) -> mmap.mmap:
        """The content. Raises UserError if the file has changed."""
        with open(self.local, "rb") as file:
            self.check(os.fstat(file.fileno()))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def sampled(local: str) -> str:
    """Size of a file and a hash of SAMPLES blocks spread evenly over it, its first and last bytes among them."""
    size, block = os.path.getsize(local), 1 << 16
    digest = hashlib.sha256()
    with open(local, "rb") as file:
        for k in range(SAMPLES):
            file.seek(max(0, size - block) * k // (SAMPLES - 1))
            digest.update(file.read(block))
    return f"{size} {digest.hexdigest()}"


def unpacked(path: str) -> tuple[str, str]:
    """The local file with the content of `path` (local or gs://), and its kind: "json", "tar" or one of kinds.TABLES.

    Files that are compressed or not UTF-8 are written to the scratch folder, which is deleted with this process.

    Raises:
      UserError: it cannot be read or unpacked, or its format is not supported.
    """
    try:
        local = _local(path)
        for _ in range(LAYERS):
            kind = kind_of(local, path)
            if kind not in CODECS.values() and kind not in (*TEXTS.values(), "utf-16-le", "utf-16-be"):
                return local, kind
            blocks = _decompressed if kind in CODECS.values() else _recoded
            packed, local = local, _written(blocks(local, kind), path)
            if packed.startswith(scratch()):
                os.remove(packed)
    except OSError as error:
        raise UserError(f"data source {path!r} cannot be read: {error.strerror or error}") from error
    raise UserError(f"data source {path!r} is compressed more than {LAYERS} times; decompress it")


def _local(path: str) -> str:
    """The file itself, or a local copy if it is in a bucket."""
    if "://" not in path:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a named pipe would wait forever
            raise UserError(f"data source {path!r} cannot be read: it is not a regular file")
        return path
    with epath.Path(path).open("rb") as file:
        return _written(iter(lambda: file.read(BLOCK), b""), path)


def _written(blocks: Iterator[bytes], path: str) -> str:
    """A new file in the scratch folder with these bytes. Raises UserError."""
    handle, target = tempfile.mkstemp(dir=scratch())
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(blocks)
    except BaseException as error:
        os.remove(target)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise no_room(path) from error
        raise
    return target


def no_room(path: str) -> UserError:
    """The error for a scratch folder that is too small."""
    free = shutil.disk_usage(scratch()).free
    return UserError(
        f"data source {path!r} is unpacked once for random access to its rows, but does not fit into "
        f"{tempfile.gettempdir()}, which has {free / 2**30:.1f} GiB left; set TMPDIR to a folder with more room"
    )


def _decompressed(local: str, codec: str) -> Iterator[bytes]:
    with pa.CompressedInputStream(pa.OSFile(local), codec) as stream:
        done = 0
        while True:
            try:
                block = stream.read(BLOCK)
            except OSError as error:  # pyarrow's; a full disk raises another error
                cut = "Truncated" in str(error)
                reason = "it is truncated" if cut else str(error)
                raise OSError(
                    f"{reason} after {done:,} bytes of content ({codec}); download or write it again"
                ) from error
            if not block:
                return
            done += len(block)
            yield block


def _recoded(local: str, encoding: str) -> Iterator[bytes]:
    """UTF-8. Half a surrogate pair is kept: it makes its row bad, not the file."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    with open(local, "rb") as file:
        done = 0
        while True:
            block = file.read(BLOCK)
            try:
                yield decoder.decode(block, final=not block).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                reason = f"it begins as {encoding.upper()}, but is not valid from byte {done + error.start:,} on"
                raise OSError(f"{reason} ({error.reason})") from None
            if not block:
                return
            done += len(block)
