"""Compares one config on several topologies: compute, memory and interconnect per chip as the number of chips grows."""

from __future__ import annotations

import os
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from sparsecut_jax.planning.tables import gib  # noqa: E402
from sparsecut_jax.runtime.tables import table  # noqa: E402

COLORS = {"products": "#35618f", "memory": "#e8a35c", "links": "#b3262a"}
LABELS = {"products": "matmuls", "memory": "memory", "links": "interconnect"}


def row(plan: dict[str, Any]) -> dict[str, Any]:
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
    found = [own] if plan["bytes_per_chip"]["fits"] and plan["collectives"] else []
    options = plan.get("search", {}).get("options", [])
    for option in options:
        if "compiled_seconds" in option:
            found.append({"flags": option["flags"], "bytes": option["compiled"], "seconds": option["compiled_seconds"]})
    if not found:
        found = [{key: option[key] for key in own} for option in options[:1]]
    return min(found, key=lambda option: option["seconds"], default={})


def text(plans: list[dict[str, Any]]) -> str:
    """The plans as one table, and the recommended settings for each."""
    head = [
        "topology",
        "sequences",
        "GiB",
        "model TFLOP",
        "memory GB",
        "interconnect GB",
        "matmul s",
        "memory s",
        "interconnect s",
        "interconnect / roofline",
    ]
    found = [row(plan) for plan in plans]
    rows = [
        [
            r["topology"], f"{r['rows']:,}", gib(r["bytes"]) if r["fits"] else "does not fit", f"{r['flops'] / 1e12:,.1f}",
            f"{r['moved'] / 1e9:,.1f}", f"{r['crossing'] / 1e9:,.1f}" if r["crossing"] else "-",
            *(f"{r['seconds'][key]:.3f}" for key in ("products", "memory", "links")), f"{r['links_share']:.0%}",
        ]
        for r in found
    ]  # fmt: skip
    by = "compiled step" if any(plan["collectives"] for plan in plans) else "analytic model"
    lines = ["per chip and step:", "", table(head, rows), "", f"recommended, by the roofline of the {by}:"]
    return "\n".join([*lines, *(f"  {r['topology']:<12} {_recommended(r['recommended'])}" for r in found)])


def _recommended(setting: dict[str, Any]) -> str:
    if not setting:
        return "nothing fits"
    return f"{setting['seconds']:.3f} s, {gib(setting['bytes'])} GiB: {setting['flags']}"


def save(path: str | os.PathLike, plans: list[dict[str, Any]]) -> None:
    """Draws the terms of the roofline and the memory per chip over the number of chips, and writes a PNG file."""
    found = [row(plan) for plan in plans]
    chips = [str(r["chips"]) for r in found]
    figure, (times, bytes_) = plt.subplots(1, 2, figsize=(11, 4), dpi=120, layout="constrained")
    for key, color in COLORS.items():
        times.plot(chips, [r["seconds"][key] for r in found], marker="o", color=color, label=LABELS[key])
    times.set(xlabel="chips", ylabel="seconds per step", ylim=(0, None), title="terms of the roofline, per chip")
    times.legend(frameon=False)
    bytes_.bar(chips, [r["bytes"] / 2**30 for r in found], color="#6ba3c7")
    bytes_.axhline(
        plans[0]["bytes_per_chip"]["memory"] / 2**30, color=COLORS["links"], linestyle="--", label="memory of a chip"
    )
    bytes_.set(xlabel="chips", ylabel="GiB per chip", title="memory needed")
    bytes_.legend(frameon=False)
    for axes in (times, bytes_):
        axes.spines[["top", "right"]].set_visible(False)
    per_chip = found[0]["rows"] / found[0]["chips"]
    sequences = "1 sequence" if per_chip == 1 else f"{per_chip:g} sequences"
    figure.suptitle(f"{plans[0]['config']}, stage {plans[0]['stage']}, {sequences} per chip")
    figure.savefig(path)
    plt.close(figure)
