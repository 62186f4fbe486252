"""Every way of fusing and of injecting, found by its file name, and what a config asks of them.

Every file in models/fusing/ or models/injecting/ is a way; models/interfaces.py says what it must have.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any, Literal

from sparsecut_jax import settings
from sparsecut_jax.models import fusing, injecting
from sparsecut_jax.models.interfaces import Wiring
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError, nearest


def _ways_in(package: ModuleType) -> dict[str, ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


FUSING = _ways_in(fusing)
INJECTING = _ways_in(injecting)


def chosen(names: Collection[str]) -> list[str]:
    """The ways of fusing that --ways lists, each once; "all" stands for every one. Raises UserError for an unknown one."""
    listed = [way for name in names for way in (FUSING if name == "all" else [name])]
    for name in listed:
        if name not in FUSING:
            known = ("all", *FUSING)
            raise UserError(f"--ways: unknown way {name!r}{nearest(name, known)}; expected some of {', '.join(known)}")
    return list(dict.fromkeys(listed))


def own_settings(group: Any, name: str, ways: Mapping[str, ModuleType]) -> Any:
    """The settings of way `name` alone, from `config.fusion` or `config.injecting`; None if it has none."""
    kind = getattr(ways[name], "Settings", None)
    return None if kind is None else getattr(group, name, kind())


def wiring_of(cfg: Config) -> Wiring:
    """What the config's way of fusing reads and where that goes. Raises UserError if it is impossible."""
    return _wired(cfg.vision, cfg.fusion, cfg.injecting, cfg.shortcuts, cfg.llm)


@functools.lru_cache(maxsize=64)
def _wired(*groups: Any) -> Wiring:
    cfg = Config(**dict(zip(("vision", "fusion", "injecting", "shortcuts", "llm"), groups, strict=True)))
    return FUSING[cfg.fusion.name].wiring(own_settings(cfg.fusion, cfg.fusion.name, FUSING), cfg)


def views(cfg: Config) -> int:
    """Views of an image that are read (V): the low-res one and the crops."""
    return view_count(wiring_of(cfg))


def view_count(wiring: Wiring) -> int:
    """Views of an image that a way reads (V)."""
    return 1 + math.prod(wiring.grid) if wiring.grid else 1


def positions(cfg: Config) -> int:
    """Positions of an image in the LLM (S)."""
    return wiring_of(cfg).positions


def check(cfg: Config) -> None:
    """Raises UserError for settings with which the config's way of fusing can never work."""
    way = FUSING[cfg.fusion.name]
    if hasattr(way, "check"):
        way.check(own_settings(cfg.fusion, cfg.fusion.name, FUSING), cfg)


def read(cfg: Config) -> list[str]:
    """The config's way of fusing, and the others whose settings it reads."""
    names = [cfg.fusion.name]
    for name in names:
        others = getattr(FUSING[name], "others", lambda settings: ())
        names += [other for other in others(own_settings(cfg.fusion, name, FUSING)) if other not in names]
    return names


def portable(fusion: settings.FusionConfig, wiring: Wiring) -> settings.FusionConfig:
    """The settings with which an exported model is read again, even if its tower is shallower than that of the config."""
    if not hasattr(FUSING[fusion.name], "portable"):
        return fusion
    own = FUSING[fusion.name].portable(own_settings(fusion, fusion.name, FUSING), wiring)
    return dataclasses.replace(fusion, **{fusion.name: own})


def sharded_sizes(cfg: Config) -> dict[str, int]:
    """{text: size} of the config's way of fusing: sizes that mesh axis tensor must divide."""
    way = FUSING[cfg.fusion.name]
    sizes = getattr(way, "sharded_sizes", None)
    return sizes(own_settings(cfg.fusion, cfg.fusion.name, FUSING), cfg) if sizes else {}


# --- the settings of all ways, for config.py ---


def with_groups(base: type, modules: Mapping[str, ModuleType], fields: list[tuple], name: str) -> type:
    """`base` with a group of settings for every module that has Settings of its own."""
    groups = {name: module.Settings for name, module in modules.items() if hasattr(module, "Settings")}
    fields = [*fields, *((group, kind, dataclasses.field(default=kind())) for group, kind in groups.items())]
    namespace = {"__module__": __name__, "__doc__": base.__doc__}
    return dataclasses.make_dataclass(name, fields, bases=(base,), frozen=True, namespace=namespace)


_ANY = settings.FusionConfig.__dataclass_fields__["name"]
_ONE = ("name", Literal[tuple(FUSING)], setting(_ANY.default, _ANY.metadata["meaning"]))
FusionConfig = with_groups(settings.FusionConfig, FUSING, [_ONE], "FusionConfig")
InjectingConfig = with_groups(settings.InjectingConfig, INJECTING, [], "InjectingConfig")
