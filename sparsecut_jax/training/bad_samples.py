"""bad_samples.jsonl: the rows that a run skipped, counted by cause, and the limit above which it stops."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import json
import os

from sparsecut_jax.data.walk import Bad
from sparsecut_jax.types import UserError


class BadSamples:
    """Records every bad row once per stage, over all starts of a run. Each process has its own file.

    Attributes:
      cut: {stage: (answers dropped because they do not fit into seq_len, rows that lose some)}.
    """

    def __init__(self, workdir: str, max_fraction: float, process_index: int = 0, fresh: bool = False):
        """Reads what earlier starts recorded; `fresh` deletes it, for a run that begins at its first step."""
        name = f"bad_samples-{process_index}.jsonl" if process_index else "bad_samples.jsonl"
        self.path, self.max_fraction = os.path.join(workdir, name), max_fraction
        self.files = os.path.join(glob.escape(workdir), "bad_samples*.jsonl")
        self.noted: dict[str, dict[tuple[str, int], Bad]] = collections.defaultdict(dict)
        self.torn = False  # whether the file ends in the middle of a line
        self.cut: dict[str, tuple[int, int]] = {}
        if fresh:
            for path in [self.path] if process_index else glob.glob(self.files):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
        else:
            self.torn = self._read(self.path)

    def _read(self, path: str) -> bool:
        """Reads a file; returns whether it ends in the middle of a line."""
        torn = False
        with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
            for line in file:
                torn = not line.endswith("\n")
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut off when the process was killed
                    fields = json.loads(line)
                    bad = Bad(**{field.name: fields[field.name] for field in dataclasses.fields(Bad)})
                    self.noted[fields["stage"]][bad.key] = bad
        return torn

    def add(self, stage: str, found: list[Bad], rows: int, write: bool = True) -> None:
        """Records the bad rows of a stage of `rows` rows. write=False: they are already in another process's file.

        Raises:
          UserError: more than `max_fraction` of the rows are broken. Rows that are merely too long do not count.
        """
        noted = self.noted[stage]
        if new := {bad.key: bad for bad in found if bad.key not in noted}:
            if write:
                with open(self.path, "a") as file:
                    file.write("\n" if self.torn else "")
                    lines = ({"stage": stage, **dataclasses.asdict(bad)} for bad in new.values())
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                self.torn = False
            noted.update(new)
        if all(bad.cause == "too_long" for bad in found):
            return
        broken = [bad for bad in noted.values() if bad.cause != "too_long"]
        allowed = int(self.max_fraction * rows)
        if len(broken) > allowed:
            raise UserError(
                f"{broken[0].reason} ({len(broken):,} of {rows:,} rows of stage {stage} are broken so far: "
                f"{_listing(broken)}; config.data.max_bad_fraction={self.max_fraction:g} allows {allowed:,}; all are in "
                f"{self.path}, and `python -m sparsecut_jax.data check` finds them before a run)"
            )

    def counts(self) -> dict[str, int]:
        """{cause: bad rows in all processes so far}; a row found in several stages counts once."""
        for path in set(glob.glob(self.files)) - {self.path}:
            self._read(path)
        unique = {(bad.key, bad.cause) for noted in self.noted.values() for bad in noted.values()}
        return dict(sorted(collections.Counter(cause for _, cause in unique).items()))


def _listing(found: list[Bad]) -> str:
    counts = collections.Counter(bad.cause for bad in found)
    return ", ".join(f"{count:,} {cause}" for cause, count in counts.most_common())
