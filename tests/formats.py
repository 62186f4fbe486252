"""Writes rows in every format that is read."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PAIR = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string()), ("kind", pa.string())]))
NAMES = [
    "list.json", "lines.jsonl", "lines.jsonl.gz", "lines.jsonl.zst", "utf16.json", "one.parquet", "shards",
    "paths.parquet", "binary.parquet", "stream.arrow", "file.arrow", "lz4.feather", "saved", "dict", "dict/train",
    "rows.tar", "rows.tar.gz", "tars",
]  # fmt: skip


def table(rows: list[dict], pictures: dict[str, bytes]) -> pa.Table:
    """As `datasets` writes rows of {"id", "image", "conversations"}: pictures inside, null where a key is absent."""
    cells = [
        {"bytes": pictures[row["image"]], "path": row["image"]} if row.get("image") is not None else None
        for row in rows
    ]
    turns = [row["conversations"] for row in rows]
    columns = {"id": pa.array([row["id"] for row in rows], pa.string()), "image": pa.array(cells, PAIR)}
    return pa.table(columns | {"conversations": pa.array(turns, TURNS)})


def write_stream(content: pa.Table, path: Path, rows: int = 1000, **options) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema, **options) as writer:
        writer.write_table(content, max_chunksize=rows)


def write_arrow(content: pa.Table, path: Path, rows: int = 1000, **options) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, content.schema, **options) as writer:
        writer.write_table(content, max_chunksize=rows)


def save_to_disk(content: pa.Table, folder: Path, shards: int = 2) -> None:
    """A folder as Dataset.save_to_disk of `datasets` 5.2 lays it out."""
    folder.mkdir(parents=True)
    size = -(-len(content) // shards)
    names = [f"data-{k:05}-of-{shards:05}.arrow" for k in range(shards)]
    for k, name in enumerate(names):
        write_stream(content.slice(k * size, size), folder / name)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "063a8414e81b0920", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"id": {"dtype": "string", "_type": "Value"}}}))


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def members(rows: list[dict], pictures: dict[str, bytes]) -> list[tuple[str, bytes]]:
    found = []
    for i, row in enumerate(rows):
        if row.get("image") is not None:
            found.append((f"some/{i:04}.{row['image'].rpartition('.')[2]}", pictures[row["image"]]))
        found.append((f"some/{i:04}.json", json.dumps(row).encode()))
    return found


def write_all(folder: Path, rows: list[dict], pictures: dict[str, bytes]) -> dict[str, str]:
    """Paths of the same rows in every format, by its name; the pictures are in `folder`/images."""
    os.makedirs(folder / "images")
    for name, content in pictures.items():
        (folder / "images" / name).write_bytes(content)
    whole, half = table(rows, pictures), len(rows) // 2
    lines = "\n".join(map(json.dumps, rows)).encode()
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "lines.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines).to_pybytes())
    (folder / "utf16.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode("utf-16"))
    pq.write_table(whole, folder / "one.parquet", row_group_size=3)
    (folder / "shards").mkdir()
    pq.write_table(whole.slice(0, half), folder / "shards" / "train-00000-of-00002.parquet")
    pq.write_table(whole.slice(half), folder / "shards" / "train-00001-of-00002.parquet", compression="zstd")
    (folder / "shards" / "README.md").write_text("no data")
    paths = whole.set_column(1, "image", pa.array([row.get("image") for row in rows]))
    pq.write_table(paths, folder / "paths.parquet")
    plain = whole.set_column(1, "image", pa.array([cell and cell["bytes"] for cell in whole["image"].to_pylist()]))
    pq.write_table(plain, folder / "binary.parquet")
    write_stream(whole, folder / "stream.arrow", rows=2)
    write_arrow(whole, folder / "file.arrow", rows=2)
    write_arrow(whole, folder / "lz4.feather", options=pa.ipc.IpcWriteOptions(compression="lz4"))
    save_to_disk(whole, folder / "saved")
    save_to_disk(whole, folder / "dict" / "train")
    save_to_disk(whole.slice(0, 1), folder / "dict" / "test", 1)
    (folder / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    content = members(rows, pictures)
    (folder / "rows.tar").write_bytes(tar_of(content))
    (folder / "rows.tar.gz").write_bytes(gzip.compress(tar_of(content)))
    (folder / "unsorted.tar").write_bytes(tar_of(sorted(content, key=lambda found: found[0].endswith("json"))))
    (folder / "tars").mkdir()
    cut = next(k for k, (name, _) in enumerate(content) if name.startswith(f"some/{half:04}"))
    (folder / "tars" / "000.tar").write_bytes(tar_of(content[:cut]))
    (folder / "tars" / "001.tar").write_bytes(tar_of(content[cut:]))
    return {name: str(folder / name) for name in (*NAMES, "unsorted.tar")}
