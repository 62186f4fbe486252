"""Prints the costs of ways of fusing (planning/costs.py) as one table, also in Markdown."""

from __future__ import annotations

from typing import Any

from sparsecut_jax.planning.tables import gib
from sparsecut_jax.runtime.tables import markdown, table


def text(found: dict[str, Any]) -> str:
    """What is compared, the table, and why a way is impossible, if one is."""
    lines = [
        f"costs      of ways of fusing under {found['config']}, stage {found['stage']}, on {found['topology']}",
        *(f"note       {note}" for note in found["notes"]),
        f"sample     {_sample(found)}",
        f"pictures   {_pictures(found)}",
        f"step       {found['batch_size']} samples; FLOPs of a training sample, forward and backward",
        f"prompt     one image and {found['prompt']} positions of text; token: one more after it",
    ]
    return "\n".join([*lines, "", table(*_table(found)), *_below(found)])


def page(found: dict[str, Any]) -> str:
    """The same in Markdown."""
    said = f"{_sample(found)} {_pictures(found)}"
    return "\n".join([f"{said[0].upper()}{said[1:]}", "", markdown(*_table(found)), *_below(found), ""])


def _sample(found: dict[str, Any]) -> str:
    return f"one image and {found['text']:,} positions of text, the same text for all ways."


def _pictures(found: dict[str, Any]) -> str:
    size, (rows, columns) = found["image_size"], found["grid"]
    if not found["equal_resolution"]:
        return f"every view has {size} x {size} pixels; ways that read crops see {rows} x {columns} of them besides."
    return (
        f"the same detail for all ways: those that read one view read it as large as the {rows} x {columns} crops of "
        f"{size} x {size} pixels that the others read besides."
    )


def _table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows."""
    done = [cost for cost in found["ways"] if not cost["refusal"]]
    asked = any(cost["gathered"] is not None or cost["too_large"] for cost in done)
    tera = lambda value: f"{value / 1e12:,.2f}"
    columns = {
        "way": lambda c: c["way"],
        "pixels": lambda c: f"{c['views']} x {c['image_size']}²",
        "tokens": lambda c: f"{c['positions']:,}",
        "parameters": lambda c: f"{c['parameters']:,}",
        "tower TFLOP": lambda c: tera(c["flops"]["vision"]),
        "fusion TFLOP": lambda c: tera(c["flops"]["fusion"]),
        "LLM TFLOP": lambda c: tera(c["flops"]["llm"]),
        "prompt TFLOP": lambda c: tera(c["prefill"]),
        "token GFLOP": lambda c: f"{c['decode'] / 1e9:,.2f}",
        "GiB per chip": lambda c: gib(c["bytes"]),
    }
    if asked:
        columns["compiled GiB"] = lambda c: "refused" if c["too_large"] else gib(c["compiled"])
        columns["activations gathered"] = lambda c: "-" if c["gathered"] is None else str(len(c["gathered"]))
    if any(cost["roofline"] for cost in done):
        columns["roofline ms"] = lambda c: f"{c['roofline'] * 1e3:,.1f}"
        columns["bound by"] = lambda c: c["bound"]
    empty = ["-"] * (len(columns) - 1)
    rows = [
        [cost["way"], *empty] if cost["refusal"] else [shown(cost) for shown in columns.values()]
        for cost in found["ways"]
    ]
    return list(columns), rows


def _below(found: dict[str, Any]) -> list[str]:
    """Lines about ways that are impossible or too large, and about what is gathered."""
    lines = [f"{c['way']}: {c['refusal'] or c['too_large']}" for c in found["ways"] if c["refusal"] or c["too_large"]]
    lines += [f"{c['way']} gathers {what}" for c in found["ways"] for what in c["gathered"] or ()]
    return ["", *lines] if lines else []
