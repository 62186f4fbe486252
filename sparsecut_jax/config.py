"""From a ConfigDict to checked settings, with a sentence for whatever is wrong.

`check` is called once, at the start of a command; from then on the code reads frozen dataclasses (settings.py),
and a misspelt key cannot hide.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import re
import typing
from collections.abc import Callable
from typing import Any, Literal

from ml_collections import ConfigDict

from sparsecut_jax.settings import Config, StageConfig
from sparsecut_jax.types import UserError


def default() -> ConfigDict:
    """Every key with its default value, to be changed by a file in configs/."""
    return ConfigDict(dataclasses.asdict(Config()))


def variant_arguments(text: str, **known: Any) -> ConfigDict:
    """Arguments behind the colon of `--config=file.py:a=1,smoke`, over the defaults `known`.

    Raises:
      UserError: an argument that is not in `known`, or a value that is not of its type.
    """
    values = dict(known)
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in known:
            listing = ", ".join(known)
            raise UserError(f"config variant {key!r} is not known{nearest(key, known)}; known: {listing}")
        if isinstance(known[key], bool):
            if value not in ("", "True", "true", "1", "False", "false", "0"):
                raise UserError(f"config variant {key}={value!r}: expected True or False")
            values[key] = value in ("", "True", "true", "1")
        else:
            try:
                values[key] = type(known[key])(value)
            except ValueError:
                raise UserError(f"config variant {key}={value!r}: expected {type(known[key]).__name__}") from None
    return ConfigDict(values)


def check(raw: ConfigDict | dict) -> Config:
    """ConfigDict -> Config. Raises UserError naming key, expected and got."""
    raw = raw.to_dict() if isinstance(raw, ConfigDict) else raw
    cfg = _build(Config, raw, "config")
    _check_values(cfg)
    return cfg


def to_json(cfg: Config) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2)


def check_override(name: str, value: str | None) -> None:
    """Checks `config.a.b` and its text value, as given on the command line. Raises UserError."""
    kind: Any = Config
    path = "config"
    for key in name.split(".")[1:]:
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif not dataclasses.is_dataclass(kind):
            raise UserError(f"{name} is not a setting; {path} has no settings of its own")
        else:
            hints = typing.get_type_hints(kind)
            if key not in hints:
                raise UserError(
                    f"{path}.{key} is not a setting{nearest(key, hints)}; known: {', '.join(sorted(hints))}"
                )
            kind = hints[key]
        path += f".{key}"
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        raise UserError(f"{name} is a group of settings; set one of them, {name}.KEY=value")
    if kind in (int, float) and value is not None:
        try:
            kind(value)
        except ValueError:
            raise UserError(f"{name}={value!r}: expected {kind.__name__}") from None
    if kind is bool and (value or "").lower() not in ("true", "false"):
        raise UserError(f"{name}={value!r}: expected True or False")


def nearest(key: str, known: Any) -> str:
    """Text "; did you mean 'x'?" for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(str(key), [str(k) for k in known], 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _build(kind: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a group of settings, got {raw!r}")
    hints = typing.get_type_hints(kind)
    for key in raw:
        if key not in hints:
            raise UserError(f"{path}.{key} is not a setting{nearest(key, hints)}; known: {', '.join(sorted(hints))}")
    return kind(**{key: _convert(hints[key], value, f"{path}.{key}") for key, value in raw.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint`, or a UserError. An int is taken for a float, a list for a tuple; nothing else."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            listing = ", ".join(map(str, args))
            raise UserError(f"{path}={value!r}: expected one of {listing}{nearest(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path}={value!r}: expected a tuple, got {type(value).__name__}")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path}={value!r}: expected a group of settings")
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{path} has the key {key!r}; expected a name")
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise UserError(f"{path}={value!r}: expected a finite number")
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _check_values(cfg: Config) -> None:
    """Checks between settings, so that a run does not fail later or mean something else."""

    def need(ok: bool, sentence: str) -> None:
        if not ok:
            raise UserError(sentence)

    v, m = cfg.vision, cfg.llm
    sizes = {
        "vision": ("image_size", "patch_size", "width", "layers", "heads", "mlp_dim"),
        "llm": ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim"),
        "data": ("max_pixels", "max_images", "threads"),
        "data.scenes": ("train", "test"),
        "eval": ("batch_size", "max_new_tokens"),
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
    for key, value in {
        "llm.vocab_size": m.vocab_size,
        "llm.sliding_window": m.sliding_window,
        "llm.sliding_from": m.sliding_from,
        "data.holdout": cfg.data.holdout,
        "data.shift": cfg.data.shift,
        "data.workers": cfg.data.workers,
        "data.scenes.size": cfg.data.scenes.size,
        "data.scenes.seed": cfg.data.scenes.seed,
        "checkpoint.every": cfg.checkpoint.every,
        "eval.every": cfg.eval.every,
        "seed": cfg.seed,
    }.items():
        need(value >= 0, f"config.{key}={value}: expected 0 or more")
    need(cfg.seed < 2**32, f"config.seed={cfg.seed}: expected a number below 2^32")
    need(cfg.log_every >= 1, f"config.log_every={cfg.log_every}: expected at least 1")
    need(cfg.workdir != "", "config.workdir is empty: name the folder that the run writes to")
    need(
        v.image_size % v.patch_size == 0 or v.family == "siglip" and v.image_size > v.patch_size,
        f"config.vision.image_size={v.image_size} is not a multiple of config.vision.patch_size={v.patch_size}",
    )
    need(v.width % v.heads == 0, f"config.vision.width={v.width} is not a multiple of config.vision.heads={v.heads}")
    need(m.heads % m.kv_heads == 0, f"config.llm.heads={m.heads} is not a multiple of config.llm.kv_heads={m.kv_heads}")
    need(m.head_dim % 2 == 0, f"config.llm.head_dim={m.head_dim}: rotary embedding needs an even width")
    grid = cfg.fusion.grid
    need(
        len(grid) == 2 and all(1 <= number <= 8 for number in grid),
        f"config.fusion.grid={grid}: expected two numbers, rows and columns of crops, from 1 to 8",
    )
    need(
        grid != (1, 1),
        "config.fusion.grid=(1, 1) is one crop of the low-res view's own size, which adds nothing; "
        "config.fusion.name='mlp' reads the low-res view alone",
    )
    need(
        cfg.fusion.name != "cross_attention" or v.width % max(1, v.width // 64) == 0,
        f"config.fusion.name='cross_attention' has width // 64 heads, which does not divide config.vision.width={v.width}",
    )
    need(len(v.mean) == 3 and len(v.std) == 3, "config.vision.mean and .std: expected three numbers each")
    need(min(v.std) > 0, f"config.vision.std={v.std}: expected positive numbers")
    for key, value in {
        "vision.norm_eps": v.norm_eps,
        "llm.norm_eps": m.norm_eps,
        "llm.rope_theta": m.rope_theta,
    }.items():
        need(value > 0, f"config.{key}={value}: expected a positive number")
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
    _check_data(cfg, need)
    init = cfg.init
    _check_regexes("config.init.fresh", init.fresh)
    need(init.image_size >= 0, f"config.init.image_size={init.image_size}: expected 0 or more")
    if cfg.profile:
        window = re.fullmatch(r"(\d+):(\d+)", cfg.profile)
        need(
            bool(window) and int(window[1]) < int(window[2]),
            f"config.profile={cfg.profile!r}: expected START:STOP in optimizer steps, START before STOP",
        )


def _check_data(cfg: Config, need: Callable[[bool, str], None]) -> None:
    data = cfg.data
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
    """Raises UserError if a stage's rows are too short for the images."""
    tokens = cfg.tokens_per_image * cfg.data.max_images
    for name, stage in cfg.stages.items():
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
            raise UserError(f"{name} has {pattern!r}, which is no regex: {error}") from None
