"""Prints a plan (planning/answer.py) as text tables, and several plans of one config beside one another: compute, memory and
interconnect per chip as the number of chips grows."""

from __future__ import annotations

from typing import Any

from sparsecut_jax.runtime.hardware import GIB
from sparsecut_jax.runtime.tables import table

KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer (Adam's moments)",
    "batch": "batch",
    "gradients": "gradients",
    "activations": "activations kept for backward",
    "working": "other temporaries",
    "code": "program and padding",
}
PARTS = {"vision": "vision tower", "fusion": "fusion", "llm": "LLM", "loss": "loss", "total": "total"}
LINES = {
    "compute": "matmuls at peak rate",
    "memory": "memory",
    "links": "interconnect in a {}",
    "network": "network between {}s",
}


def text(plan: dict[str, Any]) -> str:
    """All tables of a plan, as one string."""
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
    accumulation = f", {s['accumulate']} micro-batches" if s["accumulate"] > 1 else ", no accumulation"
    lines = [
        f"plan       {plan['config']}, stage {plan['stage']}, on {plan['topology']}",
        f"chips      {plan['chips']} x {chip['name']}, {gib(plan['bytes_per_chip']['memory'])} GiB each",
        f"mesh       {mesh}; {s['dtype']}, attention {s['attention']}; remat: LLM {s['llm_remat']}, fusion {s['fusion_remat']}, tower {s['vision_remat']}",
        f"batch      {s['batch_size']} sequences of {s['seq_len']:,} positions: "
        f"{s['batch_size'] / s['accumulate'] / ways:g} per chip at a time{accumulation}",
        *(f"note       {note}" for note in plan["notes"]),
    ]
    return "\n".join(lines)


def bytes_table(plan: dict[str, Any]) -> str:
    b = plan["bytes_per_chip"]
    rows = [[label, gib(b[key])] for key, label in KINDS.items()]
    share = b["total"] / b["memory"]
    rows.append(["total", gib(b["total"])])
    verdict = (
        f"fits: {f'{share:.1%}' if share >= 0.001 else 'below 0.1%'} of {gib(b['memory'])} GiB"
        if b["fits"]
        else f"does not fit in {gib(b['memory'])} GiB"
    )
    if b["refusal"]:
        verdict += f"; the compiler says: {b['refusal']}"
    return "\n".join([table([f"memory per chip ({b['source']})", "GiB"], rows), "", f"  {verdict}"])


def flops_table(plan: dict[str, Any]) -> str:
    work = plan["flops_per_step"]
    size, unit = flops_unit(work)
    shown = lambda value: f"{value / size:,.1f}" if value else "-"
    rows = [
        [label, shown(w["forward"]), shown(w["backward"]), shown(w["forward"] + w["backward"]), shown(w["again"])]
        for part, label in PARTS.items()
        for w in [work[part]]
    ]
    return table([f"model {unit} per step, all chips", "forward", "backward", "sum", "recomputed"], rows)


def time_table(plan: dict[str, Any]) -> str:
    t, line = plan["time"], plan["time"]["roofline"]
    size, unit = time_unit(t["seconds"])
    labels = line_labels(plan)
    rows = [[label, f"{line[key] / size:.3f}"] for key, label in labels.items() if line[key] or key != "network"]
    rows.append(
        [f"roofline: {labels[line['bound']]}, at most {t['most_mfu']:.0%} MFU", f"{line['seconds'] / size:.3f}"]
    )
    rows.append([f"expected at {t['mfu']:.0%} MFU", f"{t['seconds'] / size:.3f}"])
    if crossing := plan["collectives"]:
        parts = ", ".join(f"{kind} {moved / 1e9:.1f}" for kind, moved in crossing["bytes"].items())
        rows.append([f"interconnect, compiled step ({parts} GB per chip)", f"{crossing['seconds'] / size:.3f}"])
    positions = plan["settings"]["seq_len"]
    lines = [table([f"{unit} per step", ""], rows), ""]
    lines.append(f"  {t['tokens_per_second']:,.0f} tokens/s, counting all {positions:,} positions of a sequence")
    if t["asked_mfu"] > t["mfu"]:
        lines.append(f"  --mfu={t['asked_mfu']:g} is more than the roofline allows; {t['mfu']:.3g} is assumed")
    if t["steps"]:
        rows_text = f"{t['rows']:,} rows ({t['rows_from']}), " if t["rows"] else ""
        mean = sum(length * share for length, share in t["lengths"].items())
        lines.append(
            f"  {rows_text}{t['steps']:,} steps of {mean:,.0f} positions per sequence on average: {duration(t['hours'])}, "
            f"{t['chip_hours']:,.3g} chip-hours" + (f"; costs {t['price']:,.2f}" if "price" in t else "")
        )
    else:
        lines.append("  for the hours of a whole run, set --rows=N")
    return "\n".join(lines)


def search_table(plan: dict[str, Any]) -> str:
    search = plan["search"]
    if not search["options"]:
        line = f"  no setting fits on {plan['chips']} x {plan['chip']['name']}"
        if search["larger"]:
            option = search["larger"]["option"]
            line += f"; {search['larger']['topology']} would, with {gib(option['bytes'])} GiB per chip and {option['flags']}"
        return line
    size, unit = time_unit(max(option["seconds"] for option in search["options"]))
    other = "also fits" if plan["bytes_per_chip"]["fits"] else "would fit"
    columns = {
        f"{other} (analytic model)": lambda option: option["flags"].replace("--config.", ""),
        "GiB": lambda option: gib(option["bytes"]),
        f"roofline {unit}": lambda option: f"{option['seconds'] / size:.3f}" if option["seconds"] else "-",
        "compiled GiB": compiled,
        f"compiled {unit}": lambda o: f"{o['compiled_seconds'] / size:.3f}" if "compiled_seconds" in o else "",
    }
    if not any(map(compiled, search["options"])):
        del columns["compiled GiB"], columns[f"compiled {unit}"]
    rows = [[shown(option) for shown in columns.values()] for option in search["options"]]
    return table(list(columns), rows) + "\n\n  set them with --config.KEY=VALUE"


def compiled(option: dict[str, Any]) -> str:
    value = option.get("compiled")
    return "" if value is None else gib(value) if isinstance(value, float) else "refused"


# --- several topologies ---


def scaling_row(plan: dict[str, Any]) -> dict[str, Any]:
    """One plan (planning/answer.py) as a row of the comparison: figures per chip and step, times in seconds.

    "links" is the interconnect: the collectives of the compiled step if it was compiled, else the analytic count.
    "links_share" is relative to the roofline, the longest of the three times.
    """
    line, chips = plan["time"]["roofline"], plan["chips"]
    seconds = {"products": line["compute"], "memory": line["memory"]}
    seconds["links"] = plan["collectives"].get("seconds", line["links"] + line["network"])
    return {
        "topology": plan["topology"],
        "chips": chips,
        "rows": plan["settings"]["batch_size"],
        "bytes": plan["bytes_per_chip"]["total"],
        "fits": plan["bytes_per_chip"]["fits"],
        "flops": (plan["flops_per_step"]["total"]["forward"] + plan["flops_per_step"]["total"]["backward"]) / chips,
        "moved": line["memory"] * plan["chip"]["bandwidth"],
        "crossing": plan["collectives"].get("total", 0.0),
        "seconds": seconds,
        "links_share": seconds["links"] / max(seconds.values()),
        "recommended": recommended(plan, max(seconds.values())),
    }


def recommended(plan: dict[str, Any], seconds: float) -> dict[str, Any]:
    """{flags, bytes, seconds} of the recommended setting: the fastest compiled one, if any was compiled.

    Compiled steps come first, because the analytic model does not know what the compiler gathers twice.

    Args:
      plan: a plan of `planning/answer.py`.
      seconds: roofline of the plan's own setting.
    """
    own = {"flags": "unchanged", "bytes": plan["bytes_per_chip"]["total"], "seconds": seconds}
    settings = [own] if plan["bytes_per_chip"]["fits"] and plan["collectives"] else []
    options = plan.get("search", {}).get("options", [])
    for option in options:
        if "compiled_seconds" in option:
            settings.append(
                {"flags": option["flags"], "bytes": option["compiled"], "seconds": option["compiled_seconds"]}
            )
    if not settings:
        settings = [{key: option[key] for key in own} for option in options[:1]]
    return min(settings, key=lambda option: option["seconds"], default={})


def scaling_text(plans: list[dict[str, Any]]) -> str:
    """The plans as one table, and the recommended settings for each."""
    head = [
        "topology", "sequences", "GiB", "model TFLOP", "memory GB", "interconnect GB", "matmul s", "memory s",
        "interconnect s", "interconnect / roofline",
    ]  # fmt: skip
    compared = [scaling_row(plan) for plan in plans]
    rows = [
        [
            r["topology"], f"{r['rows']:,}", gib(r["bytes"]) if r["fits"] else "does not fit", f"{r['flops'] / 1e12:,.1f}",
            f"{r['moved'] / 1e9:,.1f}", f"{r['crossing'] / 1e9:,.1f}" if r["crossing"] else "-",
            *(f"{r['seconds'][key]:.3f}" for key in ("products", "memory", "links")), f"{r['links_share']:.0%}",
        ]
        for r in compared
    ]  # fmt: skip
    by = "compiled step" if any(plan["collectives"] for plan in plans) else "analytic model"
    lines = ["per chip and step:", "", table(head, rows), "", f"recommended, by the roofline of the {by}:"]
    return "\n".join([*lines, *(f"  {r['topology']:<12} {_recommended_text(r['recommended'])}" for r in compared)])


def _recommended_text(setting: dict[str, Any]) -> str:
    if not setting:
        return "nothing fits"
    return f"{setting['seconds']:.3f} s, {gib(setting['bytes'])} GiB: {setting['flags']}"


# --- figures ---


def gib(value: float) -> str:
    if 0 < value < GIB / 2000:
        return "<0.001"
    return f"{value / GIB:.2f}" if value >= GIB else f"{value / GIB:.3f}" if value else "-"


def line_labels(plan: dict[str, Any]) -> dict[str, str]:
    """Labels of the roofline's terms: GPUs form nodes, TPUs slices."""
    group = "node" if plan["chip"]["platform"] == "gpu" else "slice"
    return {key: label.format(group) for key, label in LINES.items()}


def time_unit(seconds: float) -> tuple[float, str]:
    """(divisor, unit) for printing times of this size."""
    return (1.0, "s") if seconds >= 0.1 else (1e-3, "ms")


def duration(hours: float) -> str:
    """The duration in hours, minutes or seconds, to three digits."""
    unit, size = next(((u, s) for u, s in (("h", 1.0), ("min", 60.0)) if hours * s >= 1), ("s", 3600.0))
    return f"{hours * size:.3g} {unit}"


def flops_unit(work: dict[str, dict[str, float]]) -> tuple[float, str]:
    """(divisor, unit) for printing the FLOPs of a step."""
    return (1e12, "TFLOP") if work["total"]["forward"] >= 1e12 else (1e9, "GFLOP")
