"""Settings without effect: one sentence each, for what the command line gives and for what config files say."""

import pytest

from configs import base, own, sparsecut
from sparsecut_jax import effects
from sparsecut_jax.config import Config, asked, default
from tiny import refusal


def put(raw, settings: dict):
    for key, value in settings.items():
        *groups, name = key.split(".")
        group = raw
        for part in groups:
            group = group[part]
        group[name] = value
    return raw


def given(settings: dict, **file):
    """The checked config of `settings` on the command line, over a file that says `file` (with __ for dots)."""
    raw = put(default(), {key.replace("__", "."): value for key, value in file.items()})
    return asked(put(raw, settings), settings)


PLAN = {"shortcuts.density": "explicit", "shortcuts.vit_levels": (0,), "shortcuts.llm_layers": (1,)}
LISTED = "with config.shortcuts.density='explicit', whose pairs are vit_levels and llm_layers; leave it out"
CASES = [
    ({"shortcuts.order": "parallel"}, PLAN, LISTED),
    ({"shortcuts.distribution": "top"}, PLAN, LISTED),
    ({"shortcuts.count": 4}, PLAN, LISTED),
    ({"shortcuts.count": 8}, {"shortcuts.density": "none"}, "with config.shortcuts.density='none'; leave it out"),
    ({"shortcuts.order": "parallel"}, {"shortcuts.density": "none"}, "with config.shortcuts.density='none'; leave it out"),
    ({"shortcuts.position": "post"}, {"shortcuts.density": "none"}, "with config.shortcuts.density='none'; leave it out"),
    ({"fusion.shared": False}, {"shortcuts.density": "none"}, "with config.shortcuts.density='none'; leave it out"),
    ({"shortcuts.count": 4}, {"shortcuts.density": "dense"},
     "with config.shortcuts.density='dense', which takes all levels; leave it out"),
    ({"shortcuts.count": 4}, {"shortcuts.density": "granite4"},
     "with config.shortcuts.density='granite4', whose pairs are its own; leave it out"),
    ({"shortcuts.order": "parallel"}, {"shortcuts.density": "random"},
     "with config.shortcuts.density='random', whose pairs are its own; leave it out"),
    ({"shortcuts.seed": 3}, {}, "with config.shortcuts.density='sparse'; leave it out, or set that to 'random'"),
    ({"shortcuts.position": "post"}, {"shortcuts.density": "qwen3vl"},
     "with config.shortcuts.density='qwen3vl', which adds after the layer; leave it out"),
    ({"shortcuts.vit_levels": (0,)}, {}, "with config.shortcuts.density='sparse'; leave it out, or set that to 'explicit'"),
    ({"shortcuts.llm_layers": (0,)}, {"shortcuts.density": "none"},
     "with config.shortcuts.density='none'; leave it out, or set that to 'explicit'"),
    ({"injecting.llm_kv.rows": "all"}, {}, "with config.fusion.name='channel', which injects by 'add'; leave it out"),
    ({"injecting.llm_kv.rows": "all"}, {"fusion.name": "emma"},
     "with config.fusion.name='emma', which injects nothing; leave it out"),
    ({"vision.select_layer": -3}, {"shortcuts.feature_order_reverse": True},
     "with config.shortcuts.feature_order_reverse=True, whose main feature is the first block's output; leave it out"),
    ({"fusion.grid": (1, 2)}, {"fusion.name": "mlp"}, "with config.fusion.name='mlp', which reads no crops; leave it out"),
    ({"llm.sliding_from": 2}, {}, "without config.llm.sliding_window; leave it out"),
    ({"llm.sliding_from": 12}, {"llm.sliding_window": 8},
     "beyond the window's reach: the LLM has layers 0 to 11; leave it out"),
    ({"llm.rope.factor": 4.0}, {},
     "with config.llm.rope.kind='default'; leave it out, or set that to linear or llama3"),
    ({"llm.rope.original_length": 64}, {"llm.rope.kind": "linear"},
     "with config.llm.rope.kind='linear'; leave it out, or set that to llama3 or longrope"),
    ({"llm.replicate_kv": True}, {}, "with config.mesh.tensor=1; leave it out"),
    ({"lora.dropout": 0.1}, {}, "with config.lora.rank=0, which means no adapters; leave it out"),
    ({"lora.alpha": 16.0}, {}, "with config.lora.rank=0, which means no adapters; leave it out"),
    ({"lora.targets": ("llm/head",)}, {}, "with config.lora.rank=0, which means no adapters; leave it out"),
    ({"init.image_size": 56}, {"init.llm": "DIR"}, "without config.init.model or config.init.vision; leave it out"),
    ({"init.grow_vocab": True}, {"init.vision": "DIR"}, "without config.init.model or config.init.llm; leave it out"),
    ({"init.fresh": ("llm/head",)}, {},
     "without config.init.model or config.init.vision or config.init.llm or config.init.fusion; leave it out"),
    ({"init_parts": ("fusion/.*",)}, {}, "without config.init_from; leave it out"),
    ({"data.source": "rows.json"}, {"data.mix": {"a": {"path": "a.json"}}},
     "with config.data.mix, whose sources are described there; leave it out"),
    ({"data.images": "DIR"}, {"data.mix": {"a": {"path": "a.json"}}},
     "with config.data.mix, whose sources are described there; leave it out"),
    *(({"data.images": "DIR"}, {"data.source": name},
       f"with config.data.source={name!r}, which has its own images; leave it out")
      for name in ("easy_vqa", "scenes", "tfds:vqa")),
    ({"data.follow_links": True}, {"data.source": "scenes"},
     "with config.data.source='scenes', which has its own images; leave it out"),
    ({"data.test_images": "DIR"}, {}, "without config.data.test, the rows to test on; leave it out"),
    ({"data.scenes.size": 64}, {}, "without the source 'scenes'; leave it out"),
    ({"data.scenes.levels": ("low",)}, {"data.source": "rows.json"}, "without the source 'scenes'; leave it out"),
    ({"tokenizer.vocab_size": 600}, {"tokenizer.path": "DIR"},
     "with config.tokenizer.path='DIR', which names a trained tokenizer; leave it out"),
    ({"tokenizer.vocab_size": 600}, {"init.llm": "DIR"},
     "with a pretrained LLM, which has its own tokenizer; leave it out"),
    ({"stages.align.buckets": (640,)}, {}, "with batching='rows'; leave it out, or set that to 'buckets'"),
    ({"stages.align.epochs": 2.0}, {"stages.align.max_steps": 9}, "with max_steps=9; leave it out, or set that to 0"),
    ({"eval.every": 9}, {"data.holdout": 0}, "with config.data.holdout=0, which holds out no rows to evaluate on; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "switch", "expected"), CASES)
def test_a_flag_without_effect(flag, switch, expected):
    """Refused whether the switch is a flag too or stands in the config file."""
    ((key, value),) = flag.items()
    sentence = f"config.{key}={value!r} has no effect {expected}"
    with_flags = {name: found for name, found in switch.items() if name != "data.mix"}  # no flag makes a mix
    file = {name.replace(".", "__"): found for name, found in switch.items()}
    assert refusal(lambda: given(flag, **file)) == sentence
    if with_flags == switch:
        assert refusal(given, flag | switch) == sentence


def test_the_default_place_is_refused_where_a_plan_has_another():
    reason = "with config.shortcuts.density='qwen3vl', which adds after the layer; leave it out"
    sentence = f"config.shortcuts.position='pre' has no effect {reason}"
    assert refusal(given, {"shortcuts.position": "pre", "shortcuts.density": "qwen3vl"}) == sentence


BASED_ON = ("shortcuts.count", "data.source", "tokenizer.vocab_size", "stages.align.epochs", "eval.every")


@pytest.mark.parametrize(("setting", "switch", "expected"), CASES)
def test_a_config_file_without_effect(setting, switch, expected):
    """Refused, unless the command line sets what disables them, or config files pass the setting on to one another."""
    ((key, value),) = setting.items()
    file = {name.replace(".", "__"): found for name, found in (switch | setting).items()}
    if key in BASED_ON or "data.mix" in switch:
        given({}, **file)
    else:
        assert refusal(lambda: given({}, **file)) == f"config.{key}={value!r} has no effect {expected}"
    if switch and "data.mix" not in switch and not set(switch) & {"init.llm", "init.vision"}:
        given(switch, **{key.replace(".", "__"): value})


@pytest.mark.parametrize(
    "settings",
    [
        {"shortcuts.order": "parallel", "shortcuts.distribution": "top", "shortcuts.density": "dense"},
        {"shortcuts.count": 3, "shortcuts.seed": 5, "shortcuts.density": "random"},
        {"shortcuts.count": 3, "shortcuts.density": "qwen3vl"},
        {"shortcuts.feature_order_reverse": True, "shortcuts.density": "none"},  # it moves the main feature
        {"llm.sliding_window": 8, "llm.sliding_from": 11},
        {"llm.rope.kind": "linear", "llm.rope.factor": 4.0},
        {"llm.replicate_kv": True, "mesh.tensor": 2},
        {"lora.rank": 0, "lora.dropout": 0.0, "init.image_size": 0, "init.grow_vocab": False, "data.images": ""},
        {"lora.rank": 4, "lora.dropout": 0.1, "lora.alpha": 8.0},
        {"init.vision": "DIR", "init.image_size": 56, "init.fresh": ("fusion/.*",)},
        {"fusion.name": "mlp", "fusion.grid": (2, 3), "data.source": "scenes"},  # the pictures are as large
        {"data.source": "rows.json", "data.images": "DIR"},
        {"data.source": "scenes", "data.test": "rows.json", "data.images": "DIR", "data.follow_links": True},
        {"stages.align.batching": "buckets", "stages.align.buckets": (640,)},
        {"init.llm": "DIR", "llm.rope.factor": 4.0},  # what kind it is, its config.json says
        {"init.fusion": "DIR", "shortcuts.order": "parallel", "shortcuts.density": "explicit"},
    ],
)
def test_what_has_an_effect(settings):
    assert given(settings) is not None


def test_a_dataset_in_a_folder_has_pictures_of_its_own(tmp_path):
    folder = str(tmp_path)
    settings = {"data.images": "DIR", "data.source": folder}
    assert given(settings).data.images == "DIR"  # a folder of Parquet files may hold paths
    (tmp_path / "dataset_info.json").write_text("{}")
    assert refusal(given, settings) == (
        f"config.data.images='DIR' has no effect with config.data.source={folder!r}, which has its own images; leave it out"
    )


def test_a_stage_that_is_not_run():
    settings = {"stages.align.lr": 1e-3, "run_stages": ("instruct",)}
    expected = "config.stages.align.lr has no effect: config.run_stages=('instruct',) leaves that stage out"
    assert refusal(given, settings) == expected
    assert given({"run_stages": ("instruct",)}, stages__align__lr=1e-3).stages["align"].lr == 1e-3


@pytest.mark.parametrize(
    ("file", "arguments", "flags"),
    [
        (base, "", {"shortcuts.density": "none"}),
        (base, "", {"shortcuts.density": "explicit", "shortcuts.vit_levels": (0, 2), "shortcuts.llm_layers": (1, 5)}),
        (base, "smoke", {}),
        (own, "source=rows.json,images=DIR,captions=b.json", {}),
        (own, "source=rows.json", {"tokenizer.path": "DIR"}),
        (own, "source=rows.json", {"init.llm": "DIR"}),
        (sparsecut, "size=7b,stage=finetune", {"stages.instruct.batching": "packed"}),
        (sparsecut, "size=7b,stage=lora", {"init_from": "", "lora.rank": 0}),
        (sparsecut, "size=13b,plan=released", {"shortcuts.density": "none"}),
    ],
)
def test_shipped_configs_can_be_varied(file, arguments, flags):
    cfg = asked(put(file.get_config(arguments), flags), flags)
    assert cfg.workdir.startswith("runs/")


def test_every_rule_names_settings_and_switches_that_are_there():
    raw = put(default(), {"data.mix": {"a": {"path": "a.json"}}})
    cfg = asked(raw, ())
    for rule in effects.RULES:
        for key in (*rule.keys, *rule.switches):
            for setting, _ in effects._settings((key,), cfg):
                group, _, name = setting.rpartition(".")
                assert hasattr(effects._at(cfg, group), name), setting


def test_the_default_is_free_of_them():
    effects.check(Config(), ())
