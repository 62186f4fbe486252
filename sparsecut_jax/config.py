"""Turns a ConfigDict into checked settings; every error is one sentence.

`check` is called once, at the start of a command; from then on the code reads frozen dataclasses (settings/),
and a misspelt key cannot hide.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable
from typing import Any, Literal

from ml_collections import ConfigDict

from sparsecut_jax import effects, settings
from sparsecut_jax.checks import check_values
from sparsecut_jax.models import ways
from sparsecut_jax.tasks import registry
from sparsecut_jax.types import UserError, nearest

# The settings of a whole run, with those that each way of fusing, way of injecting and task has for itself.
Config = dataclasses.make_dataclass(
    "Config",
    [
        ("fusion", ways.FusionConfig, dataclasses.field(default=ways.FusionConfig())),
        ("injecting", ways.InjectingConfig, dataclasses.field(default=ways.InjectingConfig())),
        ("task", registry.TaskConfig, dataclasses.field(default=registry.TaskConfig())),
    ],
    bases=(settings.Config,),
    frozen=True,
    namespace={
        "__module__": __name__,
        "__doc__": settings.Config.__doc__,
        "tokens_per_image": property(lambda cfg: ways.positions(cfg), doc="Positions of an image in the LLM."),
    },
)
PARTS = (
    "vision.",
    "llm.",
    "fusion.",
    "injecting.",
    "shortcuts.",
    "data.image_fit",
)  # settings that say what a part computes


def default() -> ConfigDict:
    """Every key with its default value, to be changed by a file in configs/."""
    return ConfigDict(dataclasses.asdict(Config()))


def variant_arguments(text: str, **known: Any) -> ConfigDict:
    """Arguments after the colon of `--config=file.py:a=1,smoke`, over the defaults `known`.

    A tuple in `known` lists all values of its argument, the default first.

    Raises:
      UserError: an argument that is not in `known`, or a value that is not of its type or list.
    """
    values = {key: value[0] if isinstance(value, tuple) else value for key, value in known.items()}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in known:
            listing = ", ".join(known)
            raise UserError(f"config variant {key!r} is not known{nearest(key, known)}; known: {listing}")
        if isinstance(known[key], tuple):
            if value not in known[key]:
                listing = " or ".join(known[key])
                raise UserError(f"config variant {key}={value!r}: expected {listing}{nearest(value, known[key])}")
            values[key] = value
        elif isinstance(known[key], bool):
            if value not in ("", "True", "true", "1", "False", "false", "0"):
                raise UserError(f"config variant {key}={value!r}: expected True or False")
            values[key] = value in ("", "True", "true", "1")
        else:
            try:
                values[key] = type(known[key])(value)
            except ValueError:
                raise UserError(f"config variant {key}={value!r}: expected {type(known[key]).__name__}") from None
    return ConfigDict(values)


def check(raw: ConfigDict | dict) -> settings.Config:
    """ConfigDict -> Config. Raises UserError naming key, expected and got."""
    raw = raw.to_dict() if isinstance(raw, ConfigDict) else raw
    cfg = _build(Config, raw, "config")
    check_values(cfg)
    return cfg


def asked(raw: ConfigDict | dict, given: Iterable[str]) -> settings.Config:
    """`check` for a user's config: refuses settings without effect; values from the command line win over files.

    Args:
      given: settings of the command line, as "stages.align.lr".

    Raises:
      UserError: as `check`, or for a setting that has no effect.
    """
    cfg, given = check(raw), set(given)
    effects.check(cfg, given)
    overrides = {key for key in given if cfg.init.decides(key) or cfg.init_from and key.startswith(PARTS)}
    init = dataclasses.replace(cfg.init, keep=tuple(sorted({*cfg.init.keep, *overrides})))
    return dataclasses.replace(cfg, init=init)


def to_json(cfg: settings.Config) -> str:
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
                raise _unknown(path, key, hints)
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


def _build(kind: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a group of settings, got {raw!r}")
    hints = typing.get_type_hints(kind)
    for key in raw:
        if key not in hints:
            raise _unknown(path, key, hints)
    return kind(**{key: _convert(hints[key], value, f"{path}.{key}") for key, value in raw.items()})


def _unknown(path: str, key: str, hints: Iterable[str]) -> UserError:
    return UserError(f"{path}.{key} is not a setting{nearest(key, hints)}; known: {', '.join(sorted(hints))}")


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
