"""Text in aligned columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def size_text(size: int) -> str:
    """Bytes as text with three or more digits: "1.50 GiB"."""
    power = min(3, max(0, int(math.log2(max(1, size)) // 10)))
    value, unit = size / 2 ** (10 * power), ("B", "KiB", "MiB", "GiB")[power]
    return f"{value:,.{0 if value >= 100 or not power else 1 if value >= 10 else 2}f} {unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Text with aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join("  " + line(row).rstrip() for row in [head, *rows])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
