"""`data speed`: measures how fast batches are read, by number of worker processes."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np

from sparsecut_jax.data import pipeline
from sparsecut_jax.data.pipeline import Reader, next_batch, train_batches
from sparsecut_jax.data.walk import stage_plan, walk
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.settings import Config
from sparsecut_jax.types import EMPTY_SLOT

FOREVER = 10_000  # batches


def speed(reader: Reader, cfg: Config, name: str, workers: list[int], seconds: float) -> None:
    """Reads batches of stage `name` for `seconds` with each number of workers, with nothing else running.

    Prints images and tokens per second and writes data_speed.json. The first batch, which includes starting processes
    and opening files, does not count.
    """
    stage = dataclasses.replace(cfg.stages[name], max_steps=FOREVER)
    walked = walk(reader.split, reader.encode)
    plan = stage_plan(name, walked, reader.split, stage, cfg)
    reader.pictures.forget = True
    rates = []
    for count in workers:
        one = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=count))
        batches = train_batches(reader, plan, one, (cfg.seed, 0))
        with pipeline.closing(batches):
            next_batch(batches)
            began, images, tokens, read = time.monotonic(), 0, 0, 0
            while time.monotonic() - began < seconds:
                batch = next_batch(batches)[0]
                images += int(np.sum(batch.image_start != EMPTY_SLOT))
                tokens += int(np.sum(batch.segments > 0))
                read += 1
            took = time.monotonic() - began
        rates.append({
            "workers": count, "threads": cfg.data.threads, "batches": read, "seconds": took,
            "images_per_second": images / took, "tokens_per_second": tokens / took,
        })  # fmt: skip
    views, size = reader.pictures.shape[:2]
    print(f"stage {name}: {views} views of {size} pixels, {stage.batching}, {cfg.data.threads} threads per process")
    rows = [
        [str(t["workers"]), f"{t['images_per_second']:,.1f}", f"{t['tokens_per_second']:,.0f}", str(t["batches"])]
        for t in rates
    ]
    print(table(["worker processes", "images/s", "tokens/s", "batches read"], rows))
    write_json(os.path.join(cfg.workdir, "data_speed.json"), rates)
