"""`data check`: finds all bad rows of a config before training."""

from __future__ import annotations

import collections
import dataclasses
import os
import time

import numpy as np

from sparsecut_jax.data.parts import Part, Split
from sparsecut_jax.data.pipeline import Reader
from sparsecut_jax.data.walk import Bad, Encoders, Look, RowEncoder, walk
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.runtime.progress import Progress
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.types import CAUSES, Exit, shown

SHOWN = 3  # examples of each cause
WARNINGS = {
    "cut": "answers that do not fit into seq_len and are dropped",
    "duplicate": "the same images and texts as an earlier row",
}


def check_rows(readers: dict[str, Reader], look: Look, workdir: str, strict: bool = False) -> None:
    """Walks all rows of all stages, prints what is wrong and writes it to data_check.json.

    Args:
      strict: whether warnings (rows that lose answers, duplicates) are errors too.

    Raises:
      Exit: 2, something is wrong.
    """
    began, found, rows, answers = time.monotonic(), [], 0, 0
    looked: set[int] = set()
    for split, encoders in sorted(_by_rows(readers), key=lambda group: -len(group[0])):
        pictures = {id(part.pictures) for part in split.parts}
        progress = Progress(len(split), 0, "rows")
        # Captions have the same images as the other rows.
        walked = walk(split, encoders, "none" if pictures <= looked else look, digests=True, progress=progress.update)
        progress.close()
        looked |= pictures
        found += walked.bad + _cut(split, encoders, walked.cut) + _duplicates(split, walked.digests)
        rows += len(split)
        answers += int(walked.cut.sum())
    seconds = time.monotonic() - began
    counts = collections.Counter(bad.cause for bad in found)
    warnings = {} if strict else {cause: counts.pop(cause) for cause in WARNINGS if cause in counts}
    counts = dict(counts.most_common())
    path = os.path.join(workdir, "data_check.json")
    summary = {"rows": rows, "seconds": seconds, "look": look, "counts": counts, "warnings": warnings}
    write_json(path, {**summary, "cut_answers": answers, "bad": [dataclasses.asdict(bad) for bad in found]})
    how = {"none": "images not checked", "stat": "images exist, none opened", "decode": "every image opened"}
    print(f"{rows:,} rows in {seconds:.1f} s ({rows / max(seconds, 1e-9):,.0f} per second), {how[look]}")
    if not found:
        print("nothing is wrong")
        return
    meaning = {**CAUSES, **WARNINGS, "cut": f"{WARNINGS['cut']}: {answers:,} answers"}
    for heading, some in (("cause", counts), ("warning", warnings)):
        if some:
            print(table([heading, "rows", "meaning"], [[cause, f"{n:,}", meaning[cause]] for cause, n in some.items()]))
    for cause, n in {**counts, **warnings}.items():
        examples = [bad for bad in found if bad.cause == cause][:SHOWN]
        print(f"\n{cause}, first {len(examples)} of {n:,}:")
        print("\n".join(f"  {shown(bad.reason)}" for bad in examples))
    print(f"\nfull list: {path}")
    if not counts:
        print("only warnings; --strict turns them into errors")
        return
    wrong = len({bad.key for bad in found if bad.cause in counts})
    raise Exit(2, f"{wrong:,} of {rows:,} rows are bad")


def _by_rows(readers: dict[str, Reader]) -> list[tuple[Split, Encoders]]:
    """Groups stages that read the same rows, so that these are walked once."""
    groups: list[tuple[Split, dict[str, RowEncoder]]] = []
    for name, reader in readers.items():
        for split, encoders in groups:
            if split.parts == reader.split.parts:
                encoders[name] = reader.encode
                break
        else:
            groups.append((reader.split, {name: reader.encode}))
    return [(split, Encoders(encoders)) for split, encoders in groups]


def _cut(split: Split, encoders: Encoders, cut: np.ndarray) -> list[Bad]:
    """Rows that lose answers. `cut`: int32[n], how many."""
    stages = encoders.stages.items()
    lengths = " or ".join(f"{encoder.seq_len} of stage {name}" for name, encoder in stages)
    bad = []
    for i in np.flatnonzero(cut).tolist():
        part, local = split.find(i)
        answers = len(part.row(local)["conversations"]) // 2
        bad.append(_warning(part, local, "cut", f"{cut[i]} of {answers} answers do not fit into seq_len={lengths}"))
    return bad


def _duplicates(split: Split, digests: np.ndarray) -> list[Bad]:
    """Rows whose digest an earlier row of the split has."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    bad = []
    for i in np.flatnonzero((first[inverse] != np.arange(len(digests))) & (digests != 0)).tolist():
        other, place = split.find(int(first[inverse[i]]))
        bad.append(_warning(*split.find(i), "duplicate", f"the same as {other.name} row {other.number(place)}"))
    return bad


def _warning(part: Part, local: int, cause: str, what: str) -> Bad:
    row = part.row(local)
    return Bad(part.name, part.number(local), str(row.get("id", "")), cause, f"{part.label(local, row)}: {what}")
