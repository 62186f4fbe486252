"""Validates settings, alone and in combination; an invalid one raises UserError with one sentence."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sparsecut_jax.models import ways
from sparsecut_jax.settings import Config, StageConfig
from sparsecut_jax.tasks import registry
from sparsecut_jax.types import UserError, nearest

MOST_THREADS = 256  # each prefetches its own batches
MOST_WORKERS = 256
MOST_RANK = 2**14
# Fields of RopeConfig that each kind reads.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
    "longrope": ("original_length", "short_factor", "long_factor", "attention_factor"),
}


def positive(value: Any) -> bool:
    """Whether it is a finite number above 0; True does not count."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def rope_fault(rope: Mapping[str, Any], frequencies: int) -> tuple[str, Any, str] | None:
    """The first invalid field of a RopeConfig, its value and what is expected; None if all are valid.

    Used for settings and for config.json, so values may have any type.

    Args:
      rope: the fields as a dict.
      frequencies: half the width of a head.
    """
    kind, length = rope["kind"], rope["original_length"]
    for name in ROPE_FIELDS[kind]:
        value = rope[name]
        if name in ("short_factor", "long_factor"):
            if not isinstance(value, (list, tuple)) or len(value) != frequencies:
                return name, value, f"{frequencies} numbers"
            for number in value:
                if not positive(number):
                    return name, number, "a positive number"
        elif not positive(value):
            return name, value, "a positive number"
    if kind == "llama3" and length < 1:
        return "original_length", length, "at least 1"
    if kind == "longrope" and length <= 1:
        return "original_length", length, "more than 1"
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        return "low_freq_factor", rope["low_freq_factor"], f"less than high_freq_factor={rope['high_freq_factor']!r}"
    if kind != "longrope" and rope["attention_factor"] != 1.0:
        return "attention_factor", rope["attention_factor"], f"1.0, since kind={kind!r} does not use it"
    return None


def check_rope(cfg: Config) -> None:
    """Raises UserError if `cfg.llm.rope` is invalid."""
    if fault := rope_fault(vars(cfg.llm.rope), cfg.llm.head_dim // 2):
        name, value, expected = fault
        raise UserError(f"config.llm.rope.{name}={value!r}: expected {expected}")


def check_values(cfg: Config) -> None:
    """Raises UserError for values, or combinations of values, that would fail later or mean something else."""

    def need(ok: bool, sentence: str) -> None:
        if not ok:
            raise UserError(sentence)

    v, m = cfg.vision, cfg.llm
    sizes = {
        "vision": ("image_size", "patch_size", "width", "layers", "heads", "mlp_dim"),
        "llm": ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim"),
        "data": ("max_pixels", "max_images", "threads"),
        "data.scenes": ("train", "test"),
        "eval": ("batch_size",),
        "checkpoint": ("keep",),
    }
    for group, names in sizes.items():
        for name in names:
            value = operator.attrgetter(f"{group}.{name}")(cfg)
            need(value >= 1, f"config.{group}.{name}={value}: expected at least 1")
            need(
                group not in ("vision", "llm") or value <= 2**24,
                f"config.{group}.{name}={value}: expected at most 2^24",
            )
    for key, most in {"threads": MOST_THREADS, "workers": MOST_WORKERS}.items():
        value = getattr(cfg.data, key)
        need(value <= most, f"config.data.{key}={value}: expected at most {most}")
    for key, value in {
        "llm.vocab_size": m.vocab_size,
        "llm.sliding_window": m.sliding_window,
        "llm.sliding_from": m.sliding_from,
        "data.shift": cfg.data.shift,
        "data.view_size": cfg.data.view_size,
        "data.workers": cfg.data.workers,
        "data.scenes.size": cfg.data.scenes.size,
        "data.scenes.seed": cfg.data.scenes.seed,
        "checkpoint.every": cfg.checkpoint.every,
        "eval.every": cfg.eval.every,
        "eval.max_new_tokens": cfg.eval.max_new_tokens,
        "eval.prefill_chunk": cfg.eval.prefill_chunk,
        "seed": cfg.seed,
    }.items():
        need(value >= 0, f"config.{key}={value}: expected 0 or more")
    need(cfg.data.holdout >= -1, f"config.data.holdout={cfg.data.holdout}: expected a number of rows, or -1")
    need(cfg.seed < 2**32, f"config.seed={cfg.seed}: expected a number below 2^32")
    for key, value in {"log_every": cfg.log_every, "loss_chunk": cfg.loss_chunk}.items():
        need(value >= 1, f"config.{key}={value}: expected at least 1")
    need(cfg.workdir != "", "config.workdir is empty: name the folder that the run writes to")
    need(
        v.image_size % v.patch_size == 0 or v.family == "siglip" and v.image_size > v.patch_size,
        f"config.vision.image_size={v.image_size} is not a multiple of config.vision.patch_size={v.patch_size}",
    )
    need(v.width % v.heads == 0, f"config.vision.width={v.width} is not a multiple of config.vision.heads={v.heads}")
    need(m.heads % m.kv_heads == 0, f"config.llm.heads={m.heads} is not a multiple of config.llm.kv_heads={m.kv_heads}")
    need(m.head_dim % 2 == 0, f"config.llm.head_dim={m.head_dim}: rotary embeddings need an even width")
    grid = cfg.fusion.grid
    need(
        len(grid) == 2 and all(1 <= number <= 8 for number in grid),
        f"config.fusion.grid={grid}: expected two numbers, rows and columns of crops, from 1 to 8",
    )
    need(
        grid != (1, 1),
        "config.fusion.grid=(1, 1) is one crop of the low-res view's own size, which adds nothing; "
        "choose a config.fusion.name that reads the low-res view alone",
    )
    ways.check(cfg)
    need(len(v.mean) == 3 and len(v.std) == 3, "config.vision.mean and .std: expected three numbers each")
    need(min(v.std) > 0, f"config.vision.std={v.std}: expected positive numbers")
    for key, value in {
        "vision.norm_eps": v.norm_eps,
        "llm.norm_eps": m.norm_eps,
        "llm.rope_theta": m.rope_theta,
    }.items():
        need(value > 0, f"config.{key}={value}: expected a positive number")
    if not (cfg.init.model or cfg.init.llm):  # otherwise the LLM's config.json completes it
        check_rope(cfg)
    _check_lora(cfg, need)
    _check_regexes("config.init_parts", cfg.init_parts)
    need(len(set(cfg.run_stages)) == len(cfg.run_stages), f"config.run_stages={cfg.run_stages} names a stage twice")
    need(len(cfg.run_stages) > 0, "config.run_stages is empty: name at least one stage")
    for name in cfg.run_stages:
        need(
            name in cfg.stages,
            f"config.run_stages names {name!r}, which is not in config.stages{nearest(name, cfg.stages)}; "
            f"known: {', '.join(cfg.stages)}",
        )
    for name, stage in cfg.stages.items():
        _check_stage(name, stage, need)
    registry.check(cfg)
    _check_data(cfg, need)
    init = cfg.init
    _check_regexes("config.init.fresh", init.fresh)
    for key in init.keep:
        try:
            operator.attrgetter(key)(cfg)
        except AttributeError:
            raise UserError(
                f"config.init.keep has {key!r}, which is not a setting; an example of one is 'shortcuts.density'"
            ) from None
    need(init.image_size >= 0, f"config.init.image_size={init.image_size}: expected 0 or more")
    if cfg.profile:
        window = re.fullmatch(r"(\d+):(\d+)", cfg.profile)
        need(
            bool(window) and int(window[1]) < int(window[2]),
            f"config.profile={cfg.profile!r}: expected START:STOP in optimizer steps, START before STOP",
        )


def _check_lora(cfg: Config, need: Callable[[bool, str], None]) -> None:
    lora = cfg.lora
    need(0 <= lora.rank <= MOST_RANK, f"config.lora.rank={lora.rank}: expected 0 (no adapters) to {MOST_RANK}")
    need(lora.alpha > 0, f"config.lora.alpha={lora.alpha}: expected a positive number")
    need(0 <= lora.dropout < 1, f"config.lora.dropout={lora.dropout}: expected 0 to below 1")
    need(len(lora.targets) > 0, "config.lora.targets is empty; set config.lora.rank=0 to train without adapters")
    _check_regexes("config.lora.targets", lora.targets)
    for pattern in lora.targets:
        need(
            any(re.fullmatch(pattern, path) for path in cfg.llm.linears),
            f"config.lora.targets has {pattern!r}, which matches no linear layer of the LLM; they are "
            f"{', '.join(cfg.llm.linears)}",
        )


def _check_data(cfg: Config, need: Callable[[bool, str], None]) -> None:
    data = cfg.data
    need(
        data.cache_features == "none" or not (data.flip or data.shift),
        f"config.data.cache_features={data.cache_features!r} stores each picture once, but config.data.flip={data.flip} and "
        f"config.data.shift={data.shift} change it at random; set these to False and 0",
    )
    need(
        0 <= data.max_bad_fraction <= 1,
        f"config.data.max_bad_fraction={data.max_bad_fraction}: expected a share of the rows, 0 to 1",
    )
    for name, source in data.mix.items():
        at = f"config.data.mix.{name}"
        need(source.path != "", f"{at}.path is empty: name a file or a dataset")
        need(source.weight > 0, f"{at}.weight={source.weight}: expected a positive number")
    for name, known in {"levels": ("low", "high"), "scales": ("coarse", "fine")}.items():
        value = getattr(data.scenes, name)
        need(
            len(value) > 0 and set(value) <= set(known),
            f"config.data.scenes.{name}={value}: expected some of {', '.join(known)}",
        )
    for name, stage in cfg.stages.items():
        need(
            stage.slots == 0 or stage.slots >= data.max_images,
            f"config.stages.{name}.slots={stage.slots}: expected at least config.data.max_images={data.max_images}, or 0",
        )
        for source in stage.sources:
            need(
                source in data.mix,
                f"config.stages.{name}.sources names {source!r}, which is not in config.data.mix"
                f"{nearest(source, data.mix)}; known: {', '.join(data.mix) or 'none'}",
            )


def check_room(cfg: Config) -> None:
    """Raises UserError if a stage's rows are too short for the images, or views are cut larger than the tower's input."""
    if cfg.data.view_size > cfg.vision.image_size:
        raise UserError(
            f"config.data.view_size={cfg.data.view_size}: expected at most config.vision.image_size={cfg.vision.image_size}, "
            "the side of what the tower reads, or 0"
        )
    tokens = ways.positions(cfg) * cfg.data.max_images
    for name in cfg.run_stages:
        stage = cfg.stages[name]
        if stage.seq_len <= tokens:
            raise UserError(
                f"config.stages.{name}.seq_len={stage.seq_len} leaves no room for text beside {tokens} image tokens"
            )


def _check_stage(name: str, stage: StageConfig, need: Callable[[bool, str], None]) -> None:
    at = f"config.stages.{name}"
    for key in ("seq_len", "batch_size", "accumulate"):
        value = getattr(stage, key)
        need(value >= 1, f"{at}.{key}={value}: expected at least 1")
    need(stage.slots >= 0, f"{at}.slots={stage.slots}: expected 0 or more")
    for length in stage.buckets:
        need(1 <= length <= stage.seq_len, f"{at}.buckets has {length}: expected 1 to seq_len={stage.seq_len}")
    need(
        stage.batch_size % stage.accumulate == 0,
        f"{at}.batch_size={stage.batch_size} is not a multiple of {at}.accumulate={stage.accumulate}",
    )
    need(
        stage.epochs > 0 or stage.max_steps > 0,
        f"{at}: epochs={stage.epochs} and max_steps={stage.max_steps} train nothing",
    )
    need(stage.lr > 0, f"{at}.lr={stage.lr}: expected a positive number")
    _check_regexes(f"{at}.lr_of", tuple(stage.lr_of))
    for pattern, rate in stage.lr_of.items():
        need(rate > 0, f"{at}.lr_of.{pattern}={rate}: expected a positive number")
    need(0 <= stage.warmup < 1, f"{at}.warmup={stage.warmup}: expected a share of the steps, 0 to below 1")
    _check_regexes(f"{at}.trainable", stage.trainable)
    need(stage.max_steps >= 0, f"{at}.max_steps={stage.max_steps}: expected 0 or more")
    for key in ("b1", "b2"):
        need(0 <= getattr(stage, key) < 1, f"{at}.{key}={getattr(stage, key)}: expected 0 to below 1")
    need(0 <= stage.final_lr <= 1, f"{at}.final_lr={stage.final_lr}: expected a share of lr, 0 to 1")
    need(len(stage.trainable) > 0, f"{at}.trainable is empty: the stage would train nothing")
    for key in ("clip_norm", "weight_decay"):
        need(getattr(stage, key) >= 0, f"{at}.{key}={getattr(stage, key)}: expected 0 or more")


def _check_regexes(name: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{name} has {pattern!r}, which is not a valid regular expression: {error}") from None
