"""Estimates how many optimizer steps a stage takes, and of which lengths, without reading its rows.

LLaVA's mixes are recognised by file name. Lengths are sampled from the distribution in docs/data.md: text beside an
image log-normal around 180 tokens (a caption: around 20), text alone (6 % of the conversations) around 500. A batch plan
of a few thousand such rows, made as in a run, shows how they fall into buckets or packed sequences.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os

import numpy as np

from sparsecut_jax.data.plan import Lengths, make_plan
from sparsecut_jax.data.sources import load_source
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

KNOWN = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
DRAWN = 16_384  # number of sampled rows


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one stage.

    Attributes:
      rows: rows of the dataset, None if unknown.
      source: where `rows` comes from.
      steps: optimizer steps of the whole stage; None if `rows` is unknown.
      lengths: {positions per sequence: share of the steps}.
      slots: image slots per sequence.
    """

    rows: int | None
    source: str
    steps: int | None
    lengths: dict[int, float]
    slots: int


def steps_of(cfg: Config, name: str, rows: int = 0) -> Steps:
    """The steps of stage `name`. rows: rows of its dataset; 0: those of a known file or of the source in config.data."""
    stage = cfg.stages[name]
    count, source = (rows, "--rows") if rows else _count(cfg, name)
    lengths = drawn(stage.rows, cfg.tokens_per_image, stage.seq_len)
    once = dataclasses.replace(stage, epochs=1.0, max_steps=0, batch_size=min(stage.batch_size, DRAWN // 8))
    plan = make_plan(lengths, [(np.arange(DRAWN), 1.0)], once, cfg.data.max_images, 0)
    sequences = len(plan) * once.batch_size / DRAWN  # per row
    steps = stage.max_steps or (math.ceil(count * stage.epochs * sequences / stage.batch_size) if count else None)
    shares = collections.Counter(plan.lengths.values.tolist())
    return Steps(count, source, steps, {length: n / len(plan) for length, n in sorted(shares.items())}, plan.slots)


def drawn(kind: str, image_tokens: int, seq_len: int) -> Lengths:
    """Sampled lengths of DRAWN rows of `kind`, "captions" or "conversations"."""
    rng = np.random.default_rng(0)
    images = (rng.random(DRAWN) >= (0.06 if kind == "conversations" else 0)).astype(np.int32)
    middle, width = (180, 0.7) if kind == "conversations" else (20, 0.4)
    seen = np.exp(rng.normal(np.log(middle), width, DRAWN)).clip(4, 1400)
    alone = np.exp(rng.normal(np.log(500), 0.9, DRAWN)).clip(20, seq_len)
    text = np.where(images, seen, alone).astype(np.int32)
    return Lengths(np.minimum(text + image_tokens * images, seq_len), images)


def _count(cfg: Config, name: str) -> tuple[int | None, str]:
    known = os.path.basename(cfg.data.source)
    if not cfg.data.mix and known in KNOWN:
        return KNOWN[known], known
    try:
        source = load_source(cfg)
        return len(source.stage(cfg.stages[name])), source.name
    except (UserError, OSError):
        return None, ""
