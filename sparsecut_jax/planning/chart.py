"""Draws a plan (planning/answer.py): memory per chip, FLOPs by part, and the terms of the roofline; or several plans of one
config, over the number of chips."""

from __future__ import annotations

import os
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from sparsecut_jax.planning.tables import (  # noqa: E402
    KINDS,
    PARTS,
    duration,
    flops_unit,
    gib,
    line_labels,
    scaling_row,
    time_unit,
)
from sparsecut_jax.runtime.hardware import GIB  # noqa: E402

COLORS = {
    "parameters": "#31688e",
    "optimizer": "#6ba3c7",
    "batch": "#b8d4e6",
    "gradients": "#c44e52",
    "activations": "#e8a35c",
    "working": "#f3d08a",
    "code": "#9a9a9a",
}
TERMS = {"products": ("matmuls", "#35618f"), "memory": ("memory", "#e8a35c"), "links": ("interconnect", "#b3262a")}
FORWARD, BACKWARD, AGAIN = "#35618f", "#7fa8cc", "#d9d9d9"
GOOD, BAD = "#2e7d4f", "#b3262a"


def save(path: str | os.PathLike, plan: dict[str, Any]) -> None:
    """Draws the plan and writes it as a PNG file."""
    options = plan.get("search", {}).get("options", [])
    heights = [1.5 + 0.32 * len(options), 2.2] + ([1.9] if plan["time"] else [])
    figure, panels = plt.subplots(
        len(heights), 1, figsize=(10, 1.3 + 1.05 * sum(heights)), dpi=120, height_ratios=heights, layout="constrained"
    )
    fits = plan["bytes_per_chip"]["fits"]
    figure.suptitle(
        f"{plan['config']}, stage {plan['stage']}, on {plan['topology']} ({plan['chips']} chips): "
        f"{'fits' if fits else 'does not fit'}",
        fontsize=12, color=GOOD if fits else BAD, fontweight="bold",
    )  # fmt: skip
    draw_bytes(panels[0], plan, options)
    draw_flops(panels[1], plan)
    if plan["time"]:
        draw_time(panels[2], plan)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    figure.savefig(path)
    plt.close(figure)


def draw_bytes(axes: Axes, plan: dict[str, Any], options: list[dict[str, Any]]) -> None:
    """One stacked bar for the config, a plain bar for each setting found, and a line at the chip's memory."""
    b = plan["bytes_per_chip"]
    labels, left = ["this config"], 0.0
    for key, label in KINDS.items():
        width = b[key] / GIB
        axes.barh(0, width, left=left, color=COLORS[key], label=f"{label} {gib(b[key])}", edgecolor="white", lw=0.6)
        left += width
    axes.text(left, 0, f"  {gib(b['total'])}", va="center", fontsize=9, fontweight="bold")
    for row, option in enumerate(options, 1):
        mesh = ", ".join(f"{axis} {n}" for axis, n in option["mesh"].items() if n > 1)
        micro = f", {option['accumulate']} micro-batches" if option["accumulate"] > 1 else ""
        labels.append(f"{mesh or 'one device'}, remat {option['remat']}{micro}")
        axes.barh(row, option["bytes"] / GIB, color="#8fbf9f")
        note = f"  {gib(option['bytes'])}"
        if option["seconds"]:
            size, unit = time_unit(option["seconds"])
            note += f", {option['seconds'] / size:.2f} {unit}"
        if isinstance(option.get("compiled"), float):
            note += f" (compiled {gib(option['compiled'])})"
        over = dict(facecolor="white", edgecolor="none", pad=0.4)  # covers the line at the chip's memory
        axes.text(option["bytes"] / GIB, row, note, va="center", fontsize=8, bbox=over)
    memory = b["memory"] / GIB
    most = max([left, *(option["bytes"] / GIB for option in options)])
    shown = memory if most > memory / 20 else most  # otherwise the bars would be too short to see
    axes.axvline(memory, color=BAD, linestyle="--", lw=1.2)
    edge = min(1.0, memory / (1.3 * max(shown, most)))
    axes.text(
        edge,
        0.97,
        f"{gib(b['memory'])} GiB per chip ",
        transform=axes.transAxes,
        color=BAD,
        fontsize=9,
        ha="right",
        va="top",
    )
    axes.set(xlim=(0, 1.3 * max(shown, most)), ylim=(len(labels) - 0.4, -0.9), xlabel="GiB per chip")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title(f"memory per chip, from the {b['source']}", fontsize=10, loc="left")
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_flops(axes: Axes, plan: dict[str, Any]) -> None:
    """FLOPs of forward, backward and recomputation, by part."""
    work = plan["flops_per_step"]
    size, unit = flops_unit(work)
    parts = [part for part in PARTS if part != "total"]
    left = [0.0] * len(parts)
    for key, label, color in (
        ("forward", "forward", FORWARD),
        ("backward", "backward", BACKWARD),
        ("again", "recomputed (not model FLOPs)", AGAIN),
    ):
        widths = [work[part][key] / size for part in parts]
        axes.barh(range(len(parts)), widths, left=left, color=color, label=label, edgecolor="white", lw=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    whole = work["total"]["forward"] + work["total"]["backward"]
    for row, part in enumerate(parts):
        model = work[part]["forward"] + work[part]["backward"]
        axes.text(left[row], row, f"  {model / size:,.1f} ({model / whole:.1%})", va="center", fontsize=8)
    axes.set(xlim=(0, 1.4 * max(left)), xlabel=f"{unit} per step, all chips")
    axes.set_yticks(range(len(parts)), [PARTS[part] for part in parts])
    axes.invert_yaxis()
    axes.set_title(f"model FLOPs per step: {whole / size:,.0f} {unit}", fontsize=10, loc="left")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_time(axes: Axes, plan: dict[str, Any]) -> None:
    """The terms of the roofline, and the expected time at the assumed MFU."""
    t, line = plan["time"], plan["time"]["roofline"]
    size, unit = time_unit(t["seconds"])
    names = line_labels(plan)
    keys = [key for key in names if line[key] or key != "network"]
    labels = [names[key] for key in keys] + [f"expected at {t['mfu']:.0%} MFU"]
    seconds = [line[key] / size for key in keys] + [t["seconds"] / size]
    colors = [BAD if key == line["bound"] else "#c9b8d8" for key in keys] + ["#5b3f7d"]
    axes.barh(range(len(labels)), seconds, color=colors)
    for row, value in enumerate(seconds):
        axes.text(value, row, f"  {value:.3f}", va="center", fontsize=8)
    axes.set(xlim=(0, 1.12 * max(seconds)), xlabel=f"{unit} per step")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    title = f"time: {t['tokens_per_second']:,.0f} tokens/s"
    if t["steps"]:
        title += f", {duration(t['hours'])} for {t['steps']:,} steps"
    if "price" in t:
        title += f", costs {t['price']:,.2f}"
    axes.set_title(title, fontsize=10, loc="left")


def save_scaling(path: str | os.PathLike, plans: list[dict[str, Any]]) -> None:
    """Draws the terms of the roofline and the memory per chip over the number of chips, and writes a PNG file."""
    compared = [scaling_row(plan) for plan in plans]
    chips = [str(r["chips"]) for r in compared]
    figure, (times, bytes_) = plt.subplots(1, 2, figsize=(11, 4), dpi=120, layout="constrained")
    for key, (label, color) in TERMS.items():
        times.plot(chips, [r["seconds"][key] for r in compared], marker="o", color=color, label=label)
    times.set(xlabel="chips", ylabel="seconds per step", ylim=(0, None), title="terms of the roofline, per chip")
    times.legend(frameon=False)
    bytes_.bar(chips, [r["bytes"] / GIB for r in compared], color="#6ba3c7")
    bytes_.axhline(
        plans[0]["bytes_per_chip"]["memory"] / GIB, color=TERMS["links"][1], linestyle="--", label="memory of a chip"
    )
    bytes_.set(xlabel="chips", ylabel="GiB per chip", title="memory needed")
    bytes_.legend(frameon=False)
    for axes in (times, bytes_):
        axes.spines[["top", "right"]].set_visible(False)
    per_chip = compared[0]["rows"] / compared[0]["chips"]
    sequences = "1 sequence" if per_chip == 1 else f"{per_chip:g} sequences"
    figure.suptitle(f"{plans[0]['config']}, stage {plans[0]['stage']}, {sequences} per chip")
    figure.savefig(path)
    plt.close(figure)
