"""Plots of a run: the loss curve."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from matplotlib.ticker import LogFormatter

from sparsecut_jax.runtime.figures import plt


def save_loss(path: str | os.PathLike, metrics: list[dict[str, Any]]) -> None:
    """Plots the training loss by step, one colour per stage, with the held-out loss as dots, and writes a PNG file.

    metrics: lines of metrics.jsonl; those with "stage" and "loss" or "holdout_loss" are drawn.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    stages = dict.fromkeys(line["stage"] for line in metrics if "stage" in line)
    for color, stage in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"] * len(stages), stages, strict=False):
        mine = [line for line in metrics if line.get("stage") == stage]
        for key, style, label in (("loss", "-", "training"), ("holdout_loss", "o", "held out")):
            points = [(line["step"], line[key]) for line in mine if line.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, color=color, markersize=4, linewidth=1, label=f"{stage}, {label}"
                )
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per target token (nats)", yscale="log")
    axes.grid(alpha=0.3)
    if stages:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def save_curves(path: str | os.PathLike, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Loss of several runs by step, one colour a run: training as a line, of many points smoothed over the faint ones,
    and held-out loss as dots."""
    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    colors = plt.get_cmap("tab10").colors
    for i, (name, metrics) in enumerate(runs.items()):
        color, label = colors[i % len(colors)], name
        for stage in dict.fromkeys(line["stage"] for line in metrics if "stage" in line):
            mine = [line for line in metrics if line.get("stage") == stage]
            points = np.array([(line["step"], line["loss"]) for line in mine if line.get("loss") is not None])
            if len(points):
                smooth = _smoothed(points[:, 1])
                if smooth is not None:
                    axes.plot(*points.T, color=color, linewidth=0.8, alpha=0.25)
                axes.plot(
                    points[:, 0], points[:, 1] if smooth is None else smooth, color=color, linewidth=1.5, label=label
                )
                label = None
        holdout = [(line["step"], line["holdout_loss"]) for line in metrics if line.get("holdout_loss") is not None]
        if holdout:
            axes.plot(*zip(*holdout, strict=True), "o", color=color, markersize=4, label=f"{name}, held out")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per target token (nats)", yscale="log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(_PlainNumbers(labelOnlyBase=False, minor_thresholds=(2, 0.6)))
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


class _PlainNumbers(LogFormatter):
    """0.6 instead of 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _smoothed(values: np.ndarray) -> np.ndarray | None:
    """Means over windows of a fortieth of the values, shorter at both ends; None for values too few to need it."""
    half = len(values) // 80
    if not half:
        return None
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = (np.clip(np.arange(len(values)) + by, 0, len(values)) for by in (-half, half + 1))
    return (sums[high] - sums[low]) / (high - low)
