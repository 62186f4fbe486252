"""Refuses settings that have no effect because another setting disables them.

A setting given on the command line is always checked. One that a config file changes from its default is checked too,
unless the command line sets what disables it: a file describes a whole run, and its `lora.dropout` is not a mistake if
somebody tries `--config.lora.rank=0`. Rules with `files=False` ignore config files, because these build on one another:
configs/base.py sets the number of shortcuts even for a file of yours that has none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

from sparsecut_jax.checks import ROPE_FIELDS
from sparsecut_jax.models import plans, ways
from sparsecut_jax.settings import Config, ShortcutConfig
from sparsecut_jax.tasks import registry
from sparsecut_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """When settings have no effect.

    Attributes:
      keys: the settings, without "config."; `*` is any stage, or any source of config.data.mix.
      why: function of the config and the group that holds the setting (a stage, for example): what disables the
        setting and, after a semicolon, an alternative to leaving it out; "" if the setting has an effect.
      switches: settings that `why` looks at.
      files: whether values from config files are checked, or only those from the command line.
    """

    keys: tuple[str, ...]
    why: Callable[[Config, Any], str]
    switches: tuple[str, ...]
    files: bool = True


PAIRS = {
    "none": "with config.shortcuts.density='none'",
    "explicit": "with config.shortcuts.density='explicit', whose pairs are vit_levels and llm_layers",
    **{name: f"with config.shortcuts.density={name!r}, whose pairs are its own" for name in plans.NAMED},
}


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Settings of a way or a task that has none."""


DRAWN = ("easy_vqa", "scenes")  # sources with their own images


def _plan(cfg: Config, _: Any) -> str:
    return PAIRS.get(cfg.shortcuts.density, "")


def _count(cfg: Config, _: Any) -> str:
    density = cfg.shortcuts.density
    if density == "dense":
        return "with config.shortcuts.density='dense', which takes all levels"
    return "" if density in plans.COUNTED else _plan(cfg, _)


def _seed(cfg: Config, _: Any) -> str:
    density = cfg.shortcuts.density
    return "" if density == "random" else f"with config.shortcuts.density={density!r}; set that to 'random'"


def _position(cfg: Config, _: Any) -> str:
    density = cfg.shortcuts.density
    after = f"with config.shortcuts.density={density!r}, which adds after the layer" * (density in plans.AFTER)
    return after or _no_shortcuts(cfg, _)


def _no_shortcuts(cfg: Config, _: Any) -> str:
    return PAIRS["none"] * (cfg.shortcuts.density == "none")


def _one_fusion(cfg: Config, _: Any) -> str:
    return "" if cfg.fusion.shared else _no_shortcuts(cfg, _)


def _ignored(key: str) -> Callable[[Config, Any], str]:
    def why(cfg: Config, _: Any) -> str:
        ignored = all(key.startswith(getattr(ways.FUSING[name], "IGNORES", ())) for name in ways.read(cfg))
        drawn = key == "fusion.grid" and "scenes" in _paths(cfg) and not cfg.data.scenes.size  # as large as the grid
        what = "reads no crops" if key == "fusion.grid" else "does not use it"
        return f"with config.fusion.name={cfg.fusion.name!r}, which {what}" * (ignored and not drawn)

    return why


def _other_way(name: str) -> Callable[[Config, Any], str]:
    return lambda cfg, _: f"with config.fusion.name={cfg.fusion.name!r}" * (name not in ways.read(cfg))


def _other_injection(name: str) -> Callable[[Config, Any], str]:
    def why(cfg: Config, _: Any) -> str:
        wiring = ways.wiring_of(cfg)
        how = f"injects by {wiring.injecting!r}" if wiring.names else "injects nothing"
        return f"with config.fusion.name={cfg.fusion.name!r}, which {how}" * (wiring.injecting != name)

    return why


def _other_task(name: str) -> Callable[[Config, Any], str]:
    return lambda cfg, _: f"with config.task.name={cfg.task.name!r}" * (cfg.task.name != name)


def _lists(cfg: Config, _: Any) -> str:
    density = cfg.shortcuts.density
    return "" if density == "explicit" else f"with config.shortcuts.density={density!r}; set that to 'explicit'"


def _main_feature(cfg: Config, _: Any) -> str:
    reverse = cfg.shortcuts.feature_order_reverse
    return "with config.shortcuts.feature_order_reverse=True, whose main feature is the first block's output" * reverse


def _window(cfg: Config, _: Any) -> str:
    llm = cfg.llm
    if not llm.sliding_window:
        return "without config.llm.sliding_window"
    return f"beyond the window's reach: the LLM has layers 0 to {llm.layers - 1}" * (llm.sliding_from >= llm.layers)


def _rope(name: str) -> Callable[[Config, Any], str]:
    def why(_: Config, rope: Any) -> str:
        kinds = [kind for kind, names in ROPE_FIELDS.items() if name in names]
        return (
            "" if rope.kind in kinds else f"with config.llm.rope.kind={rope.kind!r}; set that to {' or '.join(kinds)}"
        )

    return why


def _replicas(cfg: Config, _: Any) -> str:
    return "with config.mesh.tensor=1" * (cfg.mesh.tensor == 1)


def _lora(_: Config, lora: Any) -> str:
    return "with config.lora.rank=0, which means no adapters" * (lora.rank == 0)


def _no_source(*parts: str) -> Callable[[Config, Any], str]:
    def why(_: Config, init: Any) -> str:
        names = [f"config.init.{part}" for part in ("model", *parts)]
        return "" if any(getattr(init, part) for part in ("model", *parts)) else f"without {' or '.join(names)}"

    return why


def _no_run(cfg: Config, _: Any) -> str:
    return "" if cfg.init_from else "without config.init_from"


def _mixed(cfg: Config, _: Any) -> str:
    return "with config.data.mix, whose sources are described there" * bool(cfg.data.mix)


def _own_pictures(_: Config, data: Any) -> str:
    name = data.source
    built = name.startswith("tfds:") or os.path.isfile(os.path.join(name, "dataset_info.json"))
    own = not data.mix and not data.test and (name in DRAWN or built)  # rows to test on need both
    return f"with config.data.source={name!r}, which has its own images" * own


def _no_features(_: Config, data: Any) -> str:
    return "without config.data.cache_features" * (data.cache_features == "none")


def _no_test(_: Config, data: Any) -> str:
    return "" if data.test else "without config.data.test, the rows to test on"


def _drawn(_: Config, source: Any) -> str:
    return f"with path={source.path!r}, which has its own rows" * (source.path in DRAWN)


def _no_scenes(cfg: Config, _: Any) -> str:
    return "" if "scenes" in _paths(cfg) else "without the source 'scenes'"


def _tokenizer(cfg: Config, tokenizer: Any) -> str:
    if tokenizer.path:
        return f"with config.tokenizer.path={tokenizer.path!r}, which names a trained tokenizer"
    return "with a pretrained LLM, which has its own tokenizer" * bool(cfg.init.model or cfg.init.llm)


def _buckets(_: Config, stage: Any) -> str:
    return "" if stage.batching == "buckets" else f"with batching={stage.batching!r}; set that to 'buckets'"


def _epochs(_: Config, stage: Any) -> str:
    return f"with max_steps={stage.max_steps}; set that to 0" * bool(stage.max_steps)


def _no_holdout(cfg: Config, _: Any) -> str:
    return "with config.data.holdout=0, which holds out no rows to evaluate on" * (cfg.data.holdout == 0)


RULES = (
    Rule(("shortcuts.order", "shortcuts.distribution"), _plan, ("shortcuts.density",)),
    Rule(("shortcuts.count",), _count, ("shortcuts.density",), files=False),
    Rule(("shortcuts.seed",), _seed, ("shortcuts.density",)),
    Rule(("shortcuts.position",), _position, ("shortcuts.density",)),
    Rule(("shortcuts.vit_levels", "shortcuts.llm_layers"), _lists, ("shortcuts.density",)),
    Rule(("fusion.shared",), _one_fusion, ("shortcuts.density",)),
    *(
        Rule((key,), _ignored(key), ("fusion.name",), files=key != "shortcuts.count")
        for key in (
            *("fusion.grid", "fusion.shared", "vision.select_layer"),
            *(f"shortcuts.{field.name}" for field in dataclasses.fields(ShortcutConfig)),
        )
    ),
    *(
        Rule((f"fusion.{name}.{field.name}",), _other_way(name), ("fusion.name",))
        for name, way in ways.FUSING.items()
        for field in dataclasses.fields(getattr(way, "Settings", Nothing))
    ),
    *(
        Rule((f"injecting.{name}.{field.name}",), _other_injection(name), ("fusion.name",))
        for name, way in ways.INJECTING.items()
        for field in dataclasses.fields(getattr(way, "Settings", Nothing))
    ),
    *(
        Rule((f"task.{name}.{field.name}",), _other_task(name), ("task.name",))
        for name, task in registry.TASKS.items()
        for field in dataclasses.fields(getattr(task, "Settings", Nothing))
    ),
    Rule(("vision.select_layer",), _main_feature, ("shortcuts.feature_order_reverse",)),
    Rule(("llm.sliding_from",), _window, ("llm.sliding_window", "llm.layers")),
    *(
        Rule((f"llm.rope.{name}",), _rope(name), ("llm.rope.kind",))
        for name in dict.fromkeys(name for names in ROPE_FIELDS.values() for name in names)
    ),
    Rule(("llm.replicate_kv",), _replicas, ("mesh.tensor",)),
    Rule(("lora.alpha", "lora.dropout", "lora.targets"), _lora, ("lora.rank",)),
    Rule(("init.image_size",), _no_source("vision"), ("init.model", "init.vision")),
    Rule(("init.grow_vocab",), _no_source("llm"), ("init.model", "init.llm")),
    Rule(
        ("init.fresh",),
        _no_source("vision", "llm", "fusion"),
        ("init.model", "init.vision", "init.llm", "init.fusion"),
    ),
    Rule(("init_parts",), _no_run, ("init_from",)),
    Rule(("data.source", "data.images"), _mixed, (), files=False),
    Rule(("data.images", "data.follow_links"), _own_pictures, ("data.source", "data.test")),
    Rule(("data.features_dir",), _no_features, ("data.cache_features",), files=False),
    Rule(("data.test_images",), _no_test, ("data.test",)),
    Rule(tuple(f"data.mix.*.{name}" for name in ("images", "split", "data_dir", "image", "question", "answer")),
         _drawn, ("data.mix.*.path",)),
    Rule(tuple(f"data.scenes.{name}" for name in ("size", "train", "test", "seed", "levels", "scales")), _no_scenes,
         ("data.source",)),
    Rule(("tokenizer.vocab_size",), _tokenizer, ("tokenizer.path", "init.model", "init.llm"), files=False),
    Rule(("stages.*.buckets",), _buckets, ("stages.*.batching",)),
    Rule(("stages.*.epochs",), _epochs, ("stages.*.max_steps",), files=False),
    Rule(("eval.every",), _no_holdout, ("data.holdout",), files=False),
)  # fmt: skip


def check(cfg: Config, given: Collection[str], files: bool = True) -> None:
    """Raises UserError for the first requested setting that has no effect.

    Args:
      given: settings of the command line, as "stages.align.lr".
      files: whether to check settings that differ from the defaults, too. Those that a source's config.json may set
        are skipped: they are checked once it has been read.
    """
    for key in given:
        group, _, stage = key.partition(".")
        stage = stage.partition(".")[0]
        if group == "stages" and stage not in cfg.run_stages:
            raise UserError(f"config.{key} has no effect: config.run_stages={cfg.run_stages} leaves that stage out")
    for rule in RULES:
        for key, name in _settings(rule.keys, cfg):
            if files and cfg.init.decides(key):
                continue
            group = _at(cfg, key.rpartition(".")[0])
            value, default = getattr(group, key.rpartition(".")[2]), getattr(type(group)(), key.rpartition(".")[2])
            asked = key in given and (value or value != default)  # --config.lora.dropout=0 asks for nothing
            turned = any(switch.replace("*", name) in given for switch in rule.switches)
            asked = asked or (files and rule.files and value != default and not turned)
            if asked and (why := rule.why(cfg, group)):
                reason, _, instead = why.partition("; ")
                raise UserError(
                    f"config.{key}={value!r} has no effect {reason}; leave it out{', or ' * bool(instead)}{instead}"
                )


def _paths(cfg: Config) -> list[str]:
    return [source.path for source in cfg.data.mix.values()] or [cfg.data.source]


def _settings(keys: tuple[str, ...], cfg: Config) -> Iterator[tuple[str, str]]:
    """(setting, what `*` stands for) for each of `keys`."""
    for key in keys:
        before, star, _ = key.partition("*")
        for name in _at(cfg, before.rstrip(".")) if star else [""]:
            yield key.replace("*", name), name


def _at(cfg: Config, path: str) -> Any:
    """The group at `path`, such as "stages.align" or ""."""
    for name in filter(None, path.split(".")):
        cfg = cfg[name] if isinstance(cfg, dict) else getattr(cfg, name)
    return cfg
