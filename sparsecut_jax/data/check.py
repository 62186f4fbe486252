"""`data check`: everything that is wrong with the rows of a config, before the first step."""

from __future__ import annotations

import collections
import dataclasses
import os
import time

import numpy as np

from sparsecut_jax.cli import Exit, shown
from sparsecut_jax.data.parts import Split
from sparsecut_jax.data.pipeline import Reader
from sparsecut_jax.data.walk import Bad, Encoders, Look, RowEncoder, walk
from sparsecut_jax.training.report import Progress, table
from sparsecut_jax.training.workdir import write_json
from sparsecut_jax.types import CAUSES

SHOWN = 3  # examples of each cause
MEANING = {**CAUSES, "duplicate": "the same images and words as an earlier row"}


def check_rows(readers: dict[str, Reader], look: Look, workdir: str) -> None:
    """Walks all rows of all stages, prints what is wrong and writes it to data_check.json.

    Raises:
      Exit: 2, something is wrong.
    """
    began, found, rows = time.monotonic(), [], 0
    looked: set[int] = set()
    for split, encoders in sorted(_by_rows(readers), key=lambda group: -len(group[0])):
        pictures = {id(part.pictures) for part in split.parts}
        progress = Progress(len(split), 0, "rows")
        # Captions have the pictures that the other rows have.
        walked = walk(split, encoders, "none" if pictures <= looked else look, digests=True, progress=progress.update)
        progress.close()
        looked |= pictures
        found += walked.bad + _duplicates(split, walked.digests)
        rows += len(split)
    seconds = time.monotonic() - began
    counts = dict(collections.Counter(bad.cause for bad in found).most_common())
    path = os.path.join(workdir, "data_check.json")
    listed = [dataclasses.asdict(bad) for bad in found]
    write_json(path, {"rows": rows, "seconds": seconds, "look": look, "counts": counts, "bad": listed})
    how = {"none": "images not looked at", "stat": "images looked for, not opened", "decode": "every image opened"}
    print(f"{rows:,} rows in {seconds:.1f} s ({rows / max(seconds, 1e-9):,.0f} a second), {how[look]}")
    if not found:
        print("nothing is wrong")
        return
    print(table(["cause", "rows", "meaning"], [[cause, f"{n:,}", MEANING[cause]] for cause, n in counts.items()]))
    for cause in counts:
        examples = [bad for bad in found if bad.cause == cause][:SHOWN]
        print(f"\n{cause}, first {len(examples)} of {counts[cause]:,}:")
        print("\n".join(f"  {shown(bad.reason)}" for bad in examples))
    print(f"\nall of them: {path}")
    raise Exit(2, f"{len({bad.key for bad in found}):,} of {rows:,} rows have something wrong with them")


def _by_rows(readers: dict[str, Reader]) -> list[tuple[Split, Encoders]]:
    """Stages that read the same rows together, so that these are walked once."""
    groups: list[tuple[Split, dict[str, RowEncoder]]] = []
    for name, reader in readers.items():
        for split, encoders in groups:
            if split.parts == reader.split.parts:
                encoders[name] = reader.encode
                break
        else:
            groups.append((reader.split, {name: reader.encode}))
    return [(split, Encoders(encoders)) for split, encoders in groups]


def _duplicates(split: Split, digests: np.ndarray) -> list[Bad]:
    """Rows whose digest an earlier row of the split has."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    found = []
    for i in np.flatnonzero((first[inverse] != np.arange(len(digests))) & (digests != 0)).tolist():
        part, local = split.find(i)
        other, place = split.find(int(first[inverse[i]]))
        same = f"{other.name} row {other.number(place)}"
        row = part.row(local)
        reason = f"{part.name} row {part.number(local)} (id {row.get('id', '?')!r}): the same as {same}"
        found.append(Bad(part.name, part.number(local), str(row.get("id", "")), "duplicate", reason))
    return found
