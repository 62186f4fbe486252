"""Detects the format of a data file from its first bytes. Other formats are refused in one sentence, whatever the file's size."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import tarfile

from sparsecut_jax.types import UserError

HEAD = 1 << 16  # bytes that are read
BOM = b"\xef\xbb\xbf"
READ = "JSON, JSONL (both also .gz, .zst, .bz2 or .lz4), Parquet, Arrow and WebDataset tar files"
CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
TEXTS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}

UNPACK = "unpack it and name a file or folder inside"
PICTURE = "config.data.source is the file of the rows, config.data.images the folder of the images"
CONVERT = "write its rows as JSONL or Parquet"
OTHERS = [  # beginning, what it is, what to do
    (rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|xl/)", "an Excel or Office file", "save the sheet as CSV and {csv}"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Office file", "save the sheet as CSV and {csv}"),
    (rb"PK\x03\x04.{26}[^/]{1,200}\.npy", "a NumPy .npz file", CONVERT),
    (rb"PK\x03\x04.{26}[^/]{1,200}/(data\.pkl|\.format|\.data)", "a PyTorch file", CONVERT),
    (rb"PK[\x03\x05]", "a ZIP archive", UNPACK),
    (rb"\xfd7zXZ\0", "an xz archive", "unpack it with `unxz`, or compress it as .zst"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (rb"SQLite format 3\0", "an SQLite database", "{sql}"),
    (rb"\x80[\x02-\x05].", "a Python pickle, which is never loaded because it can run any code", CONVERT),
    (rb"\x89HDF\r\n", "an HDF5 file", CONVERT),
    (rb"\x93NUMPY", "a NumPy .npy file", CONVERT),
    (rb"GGUF", "the weights of a model (GGUF)", "name the file of the rows"),
    (rb"FEA1", "a Feather file of version 1", "write it as Parquet"),
    (rb"PARE", "an encrypted Parquet file", "write it without encryption"),
    (rb"ORC", "an ORC file", "write it as Parquet"),
    (rb"Obj\x01", "an Avro file", "write it as Parquet"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftyp(avif|heic|mif1)", "a picture", PICTURE),
    (rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", "a video, which is not supported", "write its frames as pictures"),
    (rb"RIFF.{4}WAVE|ID3|fLaC|OggS", "audio, which is not supported", "name the file of the rows"),
    (rb"%PDF", "a PDF file", CONVERT),
    (rb"version https://git-lfs", "a Git LFS pointer, not the data", "run `git lfs pull` where it was cloned"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)", "a web page, not the data (a link to a page was downloaded)",
     "download the file itself"),
    (rb"(\xef\xbb\xbf)?\s*<[?!\w]", "XML", CONVERT),
]  # fmt: skip
HOW = {
    "csv": "convert it: pandas.read_csv(FILE).to_json('rows.jsonl', orient='records', lines=True)",
    "sql": "convert it: pandas.read_sql(...).to_json('rows.jsonl', orient='records', lines=True)",
}


def kind_of(local: str, name: str) -> str:
    """The kind: "json", "tar", one of CODECS, TEXTS (as "utf-16-le" too) or TABLES. Reads HEAD bytes.

    name: what the file is called in errors.

    Raises:
      UserError: it is none of these; the message says what it is.
      OSError: it cannot be read.
    """
    with open(local, "rb") as file:
        head = file.read(HEAD)
    for table in (CODECS, TEXTS, TABLES):
        for magic, kind in table.items():
            if head.startswith(magic):
                return kind
    if re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):
        return "zstd"  # after a frame that decoders skip
    if re.match(rb"[\s\[{]\0[^\0]", head):
        return "utf-16-le"
    if re.match(rb"\0[\s\[{]\0", head):
        return "utf-16-be"
    if _is_tar(head):
        return "tar"
    solid = head.removeprefix(BOM).lstrip(b" \t\r\n")
    if solid[:1] in (b"[", b"{") or not solid and len(head) == HEAD:  # white space may be all of HEAD
        return "json"
    what, to_do = _what(head, solid, name)
    raise UserError(f"data source {name!r} {what}; {to_do}")


def _is_tar(head: bytes) -> bool:
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
        return True
    return False


def _what(head: bytes, solid: bytes, name: str) -> tuple[str, str]:
    """What an unsupported file is, and what to do."""
    if not solid:
        return ("is an empty file" if not head else "contains only white space"), "expected at least one row"
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 28:
        return "holds the weights of a model (safetensors)", "name the file of the rows"
    for pattern, what, to_do in OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return f"is {what}", to_do.format(**HOW)
    if head[:512].count(0) == len(head[:512]):
        return "begins with zeros: an empty tar, or an incomplete download", "download it again"
    if len(head) < HEAD:
        with contextlib.suppress(ValueError):
            return f"holds one JSON {type(json.loads(solid.decode())).__name__}", "expected a list of rows"
    if head.count(0) or sum(byte < 32 and byte not in b"\t\r\n\f\x1b" for byte in head[:4096]):
        return f"is in an unknown binary format (it begins with {head[:8]!r})", f"expected {READ}"
    line = solid.splitlines()[0].decode("utf-8", "replace")[:60]
    if re.search(r"\w[,;\t]\w|\",\"", line) or name.lower().endswith((".csv", ".tsv")):
        return f"is text but not JSON; it looks like CSV, beginning with {line!r}", HOW["csv"]
    return f"is text but not JSON; it begins with {line!r}", f"expected {READ}"
