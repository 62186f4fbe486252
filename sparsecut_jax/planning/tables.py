"""A plan (planning/answer.py) as text."""

from __future__ import annotations

from typing import Any

from sparsecut_jax.planning.hardware import GIB
from sparsecut_jax.training.report import table

KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer (Adam's moments)",
    "batch": "batch",
    "gradients": "gradients",
    "activations": "activations kept for backward",
    "working": "working memory",
    "code": "program and padding",
}
PARTS = {"vision": "vision tower", "fusion": "fusion", "llm": "LLM", "loss": "loss", "total": "total"}
LINES = {
    "compute": "products at peak rate",
    "memory": "memory",
    "links": "links in a slice",
    "network": "network between slices",
}


def text(plan: dict[str, Any]) -> str:
    """All tables of a plan."""
    blocks = [heading(plan), bytes_table(plan), flops_table(plan)]
    if plan["time"]:
        blocks.append(time_table(plan))
    if "search" in plan:
        blocks.append(search_table(plan))
    return "\n\n".join(blocks)


def heading(plan: dict[str, Any]) -> str:
    s, chip = plan["settings"], plan["chip"]
    mesh = " x ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if axis != "replica" or n > 1)
    ways = plan["chips"] // plan["mesh"]["tensor"]
    turns = f", in {s['accumulate']} turns" if s["accumulate"] > 1 else ", no accumulation"
    lines = [
        f"plan       {plan['config']}, stage {plan['stage']}, on {plan['topology']}",
        f"chips      {plan['chips']} x {chip['name']}, {gib(plan['bytes_per_chip']['memory'])} GiB each",
        f"mesh       {mesh}; {s['dtype']}, attention {s['attention']}; remat: LLM {s['llm_remat']}, fusion {s['fusion_remat']}, tower {s['vision_remat']}",
        f"batch      {s['batch_size']} sequences of {s['seq_len']:,} positions: "
        f"{s['batch_size'] / s['accumulate'] / ways:g} on a chip at a time{turns}",
        *(f"note       {note}" for note in plan["notes"]),
    ]
    return "\n".join(lines)


def bytes_table(plan: dict[str, Any]) -> str:
    b = plan["bytes_per_chip"]
    rows = [[label, gib(b[key])] for key, label in KINDS.items()]
    share = b["total"] / b["memory"]
    rows.append(["total", gib(b["total"])])
    verdict = (
        f"fits: {share:.0%} of {gib(b['memory'])} GiB" if b["fits"] else f"does not fit into {gib(b['memory'])} GiB"
    )
    if b["refusal"]:
        verdict += f"; the compiler says: {b['refusal']}"
    return "\n".join([table([f"bytes per chip ({b['source']})", "GiB"], rows), "", f"  {verdict}"])


def flops_table(plan: dict[str, Any]) -> str:
    work = plan["flops_per_step"]
    size, unit = flops_unit(work)
    shown = lambda value: f"{value / size:,.1f}" if value else "-"
    rows = [
        [label, shown(w["forward"]), shown(w["backward"]), shown(w["forward"] + w["backward"]), shown(w["again"])]
        for part, label in PARTS.items()
        for w in [work[part]]
    ]
    return table([f"model {unit} per step, all chips", "forward", "backward", "sum", "computed again"], rows)


def time_table(plan: dict[str, Any]) -> str:
    t, line = plan["time"], plan["time"]["roofline"]
    rows = [[label, f"{line[key]:.3f}"] for key, label in LINES.items() if line[key] or key != "network"]
    rows.append([f"roofline: {LINES[line['bound']]}, at most {t['most_mfu']:.0%} MFU", f"{line['seconds']:.3f}"])
    rows.append([f"expected at {t['mfu']:.0%} MFU", f"{t['seconds']:.3f}"])
    lines = [table(["seconds per step", ""], rows), "", f"  {t['tokens_per_second']:,.0f} tokens/s"]
    if t["mfu"] > t["most_mfu"]:
        lines.append(f"  {t['mfu']:.0%} MFU is more than the roofline allows: assume at most --mfu={t['most_mfu']:.2f}")
    if t["steps"]:
        rows_text = f"{t['rows']:,} rows ({t['rows_from']}), " if t["rows"] else ""
        mean = sum(length * share for length, share in t["lengths"].items())
        lines.append(
            f"  {rows_text}{t['steps']:,} steps of {mean:,.0f} positions a sequence: {t['hours']:.1f} h, "
            f"{t['chip_hours']:,.0f} chip-hours" + (f", {t['price']:,.0f} for all" if "price" in t else "")
        )
    else:
        lines.append("  hours for the dataset: give --rows=N")
    return "\n".join(lines)


def search_table(plan: dict[str, Any]) -> str:
    found = plan["search"]
    if not found["options"]:
        line = f"  no setting fits on {plan['chips']} x {plan['chip']['name']}"
        if found["larger"]:
            option = found["larger"]["option"]
            line += (
                f"; {found['larger']['topology']} would do, {gib(option['bytes'])} GiB a chip with {option['flags']}"
            )
        return line
    head = ["would fit (analytic model)", "GiB", "roofline s", "compiled GiB"]
    rows = [
        [
            option["flags"].replace("--config.", ""),
            gib(option["bytes"]),
            f"{option['seconds']:.3f}" if option["seconds"] else "-",
            compiled(option),
        ]
        for option in found["options"]
    ]
    return table(head, rows) + "\n\n  settings are written --config.KEY=VALUE"


def compiled(option: dict[str, Any]) -> str:
    value = option.get("compiled")
    return "" if value is None else gib(value) if isinstance(value, float) else "refused"


def gib(value: float) -> str:
    if 0 < value < GIB / 2000:
        return "<0.001"
    return f"{value / GIB:.2f}" if value >= GIB else f"{value / GIB:.3f}" if value else "-"


def flops_unit(work: dict[str, dict[str, float]]) -> tuple[float, str]:
    """The unit in which the FLOPs of a step are written."""
    return (1e12, "TFLOP") if work["total"]["forward"] >= 1e12 else (1e9, "GFLOP")
