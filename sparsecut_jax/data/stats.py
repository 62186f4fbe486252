"""`data stats`: row lengths, images per row, and the share of non-padding tokens by batching."""

from __future__ import annotations

import dataclasses
import os
from typing import get_args, get_type_hints

import numpy as np
from matplotlib.ticker import MaxNLocator

from sparsecut_jax.data.batch_plan import Lengths
from sparsecut_jax.data.pipeline import Reader
from sparsecut_jax.data.walk import stage_plan, walk
from sparsecut_jax.models import ways
from sparsecut_jax.runtime.figures import plt
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.runtime.progress import Progress
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.settings import Config, StageConfig

BATCHINGS = get_args(get_type_hints(StageConfig)["batching"])
BINS = 60  # of a histogram, at most


def stats(readers: dict[str, Reader], cfg: Config) -> None:
    """Prints a table for every stage; writes data_stats.json and data_stats.png."""
    written, lengths = {}, {}
    for name, reader in readers.items():
        split, stage = reader.split, cfg.stages[name]
        progress = Progress(len(split), 0, f"rows of {name}")
        walked = walk(split, reader.encode, progress=progress.update)
        progress.close()
        filled = {}
        for batching in BATCHINGS:
            one = dataclasses.replace(stage, batching=batching, epochs=1.0, max_steps=0)
            plan = stage_plan(name, walked, split, one, cfg)
            filled[batching] = {"useful": plan.useful, "batches": len(plan), "slots": plan.slots}
        usable = walked.lengths.usable
        usable_lengths = Lengths(walked.lengths.tokens[usable], walked.lengths.images[usable], walked.lengths.branched)
        text = usable_lengths.tokens - usable_lengths.images * ways.positions(cfg)
        summary = {
            "rows": len(split),
            "left_out": len(split) - len(usable),
            "cut_answers": walked.cut_counts[0],
            "cut_rows": walked.cut_counts[1],
            "text_only": float(np.mean(usable_lengths.images == 0)),
            "tokens": _summary(usable_lengths.tokens),
            "text_tokens": _summary(text),
            "images": _summary(usable_lengths.images),
            "batching": filled,
        }
        _print(name, stage, summary)
        written[name], lengths[name] = summary, (usable_lengths, text)
    path = os.path.join(cfg.workdir, "data_stats")
    write_json(path + ".json", written)
    _draw(path + ".png", lengths, written, cfg)
    print(f"\nwritten: {path}.json and {path}.png")


def _summary(values: np.ndarray) -> dict[str, float]:
    quantiles = dict(zip(("min", "median", "p95", "max"), np.quantile(values, [0, 0.5, 0.95, 1]).tolist(), strict=True))
    return {"mean": float(values.mean()), **quantiles}


def _print(name: str, stage: StageConfig, told: dict) -> None:
    print(
        f"\nstage {name}: {told['rows']:,} rows, {told['left_out']:,} left out, {told['text_only']:.1%} without an image"
    )
    if told["cut_answers"]:
        print(
            f"cut: {told['cut_answers']:,} answers, of {told['cut_rows']:,} rows, do not fit into seq_len and are dropped"
        )
    keys = ("min", "median", "mean", "p95", "max")
    rows = [[label, *(f"{told[key][k]:,.1f}".removesuffix(".0") for k in keys)] for label, key in
            (("tokens per row", "tokens"), ("text tokens per row", "text_tokens"), ("images per row", "images"))]  # fmt: skip
    print(table(["", *keys], rows))
    rows = [
        [
            batching + (" (chosen)" if batching == stage.batching else ""),
            f"{f['useful']:.1%}",
            f"{f['batches']:,}",
            str(f["slots"]),
        ]
        for batching, f in told["batching"].items()
    ]
    print(table([f"at seq_len={stage.seq_len}", "non-padding", "batches per epoch", "image slots"], rows))


def bin_edges(longest: int) -> np.ndarray:
    """Edges of at most BINS bins over the integers from 0 to `longest`, halfway between two integers."""
    width = -(-(longest + 1) // BINS)
    return np.arange(0, longest + 1 + width, width) - 0.5


def _draw(path: str, lengths: dict, written: dict, cfg: Config) -> None:
    """Histograms of row lengths and images per row, and bars of non-padding tokens; one line per stage."""
    figure, grid = plt.subplots(len(lengths), 3, figsize=(13, 3.6 * len(lengths)), dpi=110, squeeze=False)
    for (name, (usable_lengths, text)), axes in zip(lengths.items(), grid, strict=True):
        seq_len, longest = cfg.stages[name].seq_len, int(usable_lengths.tokens.max())
        edges = bin_edges(longest)
        axes[0].hist(usable_lengths.tokens, bins=edges, color="#4477aa", label="image and text tokens")
        axes[0].hist(text, bins=edges, color="#ee6677", alpha=0.7, label="text tokens")
        if seq_len <= 2 * longest:  # further right it would squeeze the bars
            axes[0].axvline(seq_len, color="black", linewidth=1, linestyle="--", label="seq_len")
        axes[0].set(title=f"{name}: row lengths (seq_len = {seq_len:,})", xlabel="tokens per row", ylabel="rows")
        axes[0].margins(y=0.35)  # room for the legend
        axes[0].legend(loc="upper left")
        axes[1].hist(
            usable_lengths.images, bins=bin_edges(int(usable_lengths.images.max())), color="#4477aa", rwidth=0.8
        )
        axes[1].set(title="images per row", xlabel="images", ylabel="rows")
        for axis in (axes[0].xaxis, axes[0].yaxis, axes[1].xaxis, axes[1].yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        filled = written[name]["batching"]
        bars = axes[2].bar(list(filled), [100 * f["useful"] for f in filled.values()], color="#228833")
        axes[2].bar_label(bars, fmt="%.1f %%")
        axes[2].set(title="non-padding tokens by batching", ylabel="%", ylim=(0, 110))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
