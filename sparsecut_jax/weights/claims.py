"""Settings from the config.json of pretrained parts, and which value wins if the user sets another one.

The rule is documented at `InitConfig`: a value in the file replaces that of a config or a default; a value from the command
line (`InitConfig.keep`) replaces the file's, or is refused if the weights themselves have the file's.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from typing import Any

from flax import traverse_util

from sparsecut_jax import checks, effects
from sparsecut_jax import config as config_lib
from sparsecut_jax.config import Config
from sparsecut_jax.models import ways
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.architecture import llm_settings, official_settings, vision_settings, whole_settings
from sparsecut_jax.weights.pretrained import PARTS, WeightSource, open_sources

# Settings that determine the tensors. All others can be changed; the same weights then compute another function.
OF_WEIGHTS = {
    "vision": ("family", "image_size", "patch_size", "width", "layers", "heads", "mlp_dim", "class_token", "patch_bias",
               "pre_norm", "layer_scale"),
    "llm": ("family", "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "qkv_bias",
            "qk_norm", "tie_embeddings"),
    "fusion": ("name", "shared"),  # and what the way of fusing names, OF_WEIGHTS
}  # fmt: skip
LISTS = ("shortcuts.vit_levels", "shortcuts.llm_layers")
# One, together.
WIRING = {*(f"shortcuts.{name}" for name in ("density", "count", "seed", "distribution", "order")), *LISTS}
HINTS = {"vision.image_size": "; config.init.image_size sets another size"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A setting, such as "llm.rope.factor", its value in a source's config.json, and that file."""

    key: str
    value: Any
    file: str


def adopt(cfg: Config, sources: dict[str, WeightSource]) -> Config:
    """The config with the settings of its sources.

    Raises:
      UserError: an unsupported architecture, settings that contradict it or have no effect, or one of `cfg.init.keep` that
        the weights contradict.
    """
    raw = dataclasses.asdict(cfg)
    for claim in claims(cfg, sources):
        if not _wins(claim.key, cfg):
            *path, name = claim.key.split(".")
            group = raw
            for part in path:
                group = group[part]
            group[name] = claim.value
        elif _of_weights(claim.key, raw["fusion"]["name"]) and _differs(claim, cfg):
            raise UserError(
                f"config.{claim.key}={_value(cfg, claim.key)!r} contradicts the weights of {claim.file}, where it is "
                f"{claim.value!r}; leave it out{HINTS.get(claim.key, '')}"
            )
    adopted = config_lib.check(raw)
    checks.check_rope(adopted)
    effects.check(adopted, adopted.init.keep, files=False)
    return adopted


def differences(cfg: Config, sources: dict[str, WeightSource]) -> list[str]:
    """A line for each setting that overrides a source's config.json, and one for each file that replaced some.

    cfg: the config before `adopt`.
    """
    lines, replaced, default = [], {}, Config()
    by_key = {claim.key: claim for claim in claims(cfg, sources)}
    given = [key for key in sorted(WIRING & set(cfg.init.keep)) if key not in by_key and "shortcuts.density" in by_key]
    for claim in by_key.values():
        if not _differs(claim, cfg):
            continue
        if _wins(claim.key, cfg):
            if claim.key in cfg.init.keep:
                value = _value(cfg, claim.key)
                lines.append(f"kept       config.{claim.key}={value!r} as given; {claim.file} says {claim.value!r}")
        elif _value(cfg, claim.key) != _value(default, claim.key):
            replaced.setdefault(claim.file, []).append(f"{claim.key}={claim.value!r}, not {_value(cfg, claim.key)!r}")
    for key in given:
        file = by_key["shortcuts.density"].file
        lines.append(f"kept       config.{key}={_value(cfg, key)!r} as given; {file} has a plan of its own")
    return lines + [f"replaced   by {file}: {'; '.join(texts)}" for file, texts in replaced.items()]


def adopt_here(cfg: Config) -> tuple[Config, list[str], list[str], list[str]]:
    """`adopt` with the sources on this machine, its `differences`, the paths that exist and those that do not.

    Nothing is downloaded, and only headers are read.
    """
    paths = {part: getattr(cfg.init, part) for part in ("model", *PARTS)}
    here = {part: path if os.path.exists(path) else "" for part, path in paths.items()}
    local = dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, **here))
    sources = open_sources(local.init)
    adopted = dataclasses.replace(adopt(local, sources), init=cfg.init)
    away = [path for part, path in paths.items() if path and not here[part]]
    return adopted, differences(local, sources), [path for path in here.values() if path], away


def claims(cfg: Config, sources: dict[str, WeightSource]) -> list[Claim]:
    """All settings in the sources. Raises UserError for an unsupported architecture."""
    init, every = cfg.init, []

    def say(file: str, **groups: dict[str, Any]) -> None:
        every.extend(Claim(key, value, file) for key, value in traverse_util.flatten_dict(groups, sep=".").items())

    class_token = cfg.vision.class_token
    if "vision" in sources:
        source = sources["vision"]
        values = vision_settings(source.config, source.file, source.processor)
        if init.image_size and values["family"] == "siglip2":
            raise UserError(
                f"{source.file}: config.init.image_size is not supported for siglip2 towers of any resolution"
            )
        class_token = values["class_token"]
        say(source.file, vision=values | {"image_size": init.image_size or values["image_size"]})
    if "llm" in sources:
        source = sources["llm"]
        say(source.file, llm=llm_settings(source.config, source.file))
    if init.model and "llm" in sources:
        say(source.file, **whole_settings(source.config, source.file, class_token))
    elif "fusion" in sources:
        source = sources["fusion"]
        say(source.file, **official_settings(source.config, source.file))
    return every


def _wins(key: str, cfg: Config) -> bool:
    """Whether the config's value overrides any file.

    The wiring of shortcuts is a unit: if any part of it is given, all of it comes from the config, except that empty explicit
    lists come from the file.
    """
    if key in WIRING and not WIRING.isdisjoint(cfg.init.keep):
        return not (key in LISTS and cfg.shortcuts.density == "explicit" and not _value(cfg, key))
    return key in cfg.init.keep and not (key == "llm.vocab_size" and not cfg.llm.vocab_size)


def _of_weights(key: str, fusion: str) -> bool:
    group, _, name = key.partition(".")
    return name in OF_WEIGHTS.get(group, ()) or key in getattr(ways.FUSING[fusion], "OF_WEIGHTS", ())


def _value(cfg: Config, key: str) -> Any:
    return operator.attrgetter(key)(cfg)


def _differs(claim: Claim, cfg: Config) -> bool:
    plain = lambda x: tuple(x) if isinstance(x, list) else x
    return plain(claim.value) != plain(_value(cfg, claim.key))
