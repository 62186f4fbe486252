"""The settings: every mistake is one sentence that names key, expected and got."""

import dataclasses
import json
import re
import typing

import pytest
from ml_collections import ConfigDict

from sparsecut_jax.checks import check_room
from sparsecut_jax.config import Config, check, check_override, default, to_json, variant_arguments
from sparsecut_jax.models import ways
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.types import UserError


def changed(*settings: tuple) -> dict:
    """default() as a dict, with (dotted key, value) pairs put in."""
    raw = default().to_dict()
    for key, value in settings:
        *groups, name = key.split(".")
        group = raw
        for part in groups:
            group = group[part]
        group[name] = value
    return raw


def sentence(*settings: tuple) -> str:
    with pytest.raises(UserError) as caught:
        check(changed(*settings))
    return str(caught.value)


def test_default_is_the_default():
    assert check(default()) == Config()
    assert check({}) == Config()


def leaves(kind: type, path: str) -> dict[str, dataclasses.Field]:
    """All settings below a group by dotted path; a group by name counts as `path.NAME`."""
    found = {}
    for field, hint in zip(dataclasses.fields(kind), typing.get_type_hints(kind).values(), strict=True):
        if dataclasses.is_dataclass(hint):
            found |= leaves(hint, f"{path}.{field.name}")
            continue
        found[f"{path}.{field.name}"] = field
        if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            found |= leaves(typing.get_args(hint)[1], f"{path}.{field.name}.NAME")
    return found


def test_every_setting_says_what_it_means():
    found = leaves(Config, "config")
    assert {"config.seed", "config.llm.rope.factor", "config.stages.NAME.lr", "config.data.mix.NAME.path"} <= set(found)
    for path, field in found.items():
        meaning = field.metadata.get("meaning", "")
        assert re.fullmatch(r"[^\n]{8,160}\.", meaning), (
            f"{path} has the meaning {meaning!r}; expected one short sentence"
        )


def test_json_round_trip():
    cfg = check(changed(("seed", 7), ("run_stages", ["instruct"]), ("shortcuts.vit_levels", [0, 3])))
    assert cfg.shortcuts.vit_levels == (0, 3)
    assert check(json.loads(to_json(cfg))) == cfg


def test_config_dict_overrides():
    raw = default()
    raw.vision.width = 128
    raw.stages.align.lr = 1e-3
    raw.stages.extra = ConfigDict({"lr": 0.5})
    cfg = check(raw)
    assert cfg.vision == dataclasses.replace(Config().vision, width=128)
    assert cfg.stages["align"] == StageConfig(lr=1e-3)
    assert cfg.stages["extra"] == StageConfig(lr=0.5)
    assert sorted(cfg.stages) == ["align", "extra", "instruct"]


def test_int_is_taken_for_float_and_list_for_tuple():
    cfg = check(changed(("stages.align.lr", 1), ("vision.mean", [0, 0.5, 1])))
    assert cfg.stages["align"].lr == 1.0 and type(cfg.stages["align"].lr) is float
    assert cfg.vision.mean == (0.0, 0.5, 1.0)
    assert all(type(value) is float for value in cfg.vision.mean)


@pytest.mark.parametrize(
    ("key", "value", "start"),
    [
        ("sead", 1, "config.sead is not a setting; did you mean 'seed'?; known: attention, checkpoint, data, "),
        ("vision.image_sise", 1, "config.vision.image_sise is not a setting; did you mean 'image_size'?; known: "),
        ("stages.align.lrr", 1, "config.stages.align.lrr is not a setting; did you mean 'lr'?; known: accumulate, "),
        ("llm.qqqq", 1, "config.llm.qqqq is not a setting; known: activation, "),
    ],
)
def test_misspelt_key(key, value, start):
    assert sentence((key, value)).startswith(start)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", 1.0, "config.seed=1.0: expected int, got float"),
        ("seed", True, "config.seed=True: expected int, got bool"),
        ("seed", "1", "config.seed='1': expected int, got str"),
        ("stages.align.lr", True, "config.stages.align.lr=True: expected float, got bool"),
        ("stages.align.lr", "1e-3", "config.stages.align.lr='1e-3': expected float, got str"),
        ("stages.align.lr", None, "config.stages.align.lr=None: expected float, got NoneType"),
        ("vision.scan_layers", 1, "config.vision.scan_layers=1: expected bool, got int"),
        ("workdir", 3, "config.workdir=3: expected str, got int"),
        ("run_stages", "align", "config.run_stages='align': expected a tuple, got str"),
        ("shortcuts.vit_levels", (0, 1.5), "config.shortcuts.vit_levels[1]=1.5: expected int, got float"),
        ("vision", 3, "config.vision: expected a group of settings, got 3"),
        ("stages", [], "config.stages=[]: expected a group of settings"),
        ("stages.align", None, "config.stages.align: expected a group of settings, got None"),
    ],
)
def test_wrong_type(key, value, expected):
    assert sentence((key, value)) == expected


def test_config_is_no_group():
    with pytest.raises(UserError, match=r"^config: expected a group of settings, got \[\]$"):
        check([])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "shortcuts.density",
            "spares",
            "config.shortcuts.density='spares': expected one of none, dense, sparse, explicit, random, qwen3vl, "
            "deepstack, granite4, lin_3_18_23; did you mean 'sparse'?",
        ),
        ("data.image_fit", "zzz", "config.data.image_fit='zzz': expected one of pad, squash, crop"),
        ("data.image_fit", ["pad"], "config.data.image_fit=['pad']: expected one of pad, squash, crop"),
        ("dtype", None, "config.dtype=None: expected one of auto, float32, bfloat16"),
        (
            "stages.align.rows",
            "caption",
            "config.stages.align.rows='caption': expected one of captions, conversations; did you mean 'captions'?",
        ),
    ],
)
def test_literal_choice(key, value, expected):
    assert sentence((key, value)).startswith(expected)


@pytest.mark.parametrize(
    "key",
    [
        "vision.image_size", "vision.patch_size", "vision.width", "vision.layers", "vision.heads", "vision.mlp_dim",
        "llm.width", "llm.layers", "llm.heads", "llm.kv_heads", "llm.head_dim", "llm.mlp_dim",
        "data.max_pixels", "data.max_images", "data.threads", "eval.batch_size",
        "checkpoint.keep", "log_every", "stages.align.seq_len", "stages.align.batch_size", "stages.align.accumulate",
    ],
)  # fmt: skip
def test_at_least_one(key):
    assert sentence((key, 0)) == f"config.{key}=0: expected at least 1"


@pytest.mark.parametrize(
    "key", ["llm.vocab_size", "data.shift", "checkpoint.every", "eval.every", "eval.max_new_tokens", "seed"]
)
def test_zero_or_more(key):
    assert check(changed((key, 0))) is not None
    assert sentence((key, -1)) == f"config.{key}=-1: expected 0 or more"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([("workdir", "")], "config.workdir is empty: name the folder that the run writes to"),
        (
            [("vision.image_size", 33)],
            "config.vision.image_size=33 is not a multiple of config.vision.patch_size=8",
        ),
        ([("vision.width", 66)], "config.vision.width=66 is not a multiple of config.vision.heads=4"),
        ([("llm.kv_heads", 3)], "config.llm.heads=4 is not a multiple of config.llm.kv_heads=3"),
        ([("llm.head_dim", 15)], "config.llm.head_dim=15: rotary embeddings need an even width"),
        (
            [("fusion.name", "cross_attention"), ("vision.width", 200)],
            "config.fusion.name='cross_attention' has width // 64 heads, which does not divide config.vision.width=200",
        ),
        (
            [("fusion.grid", (2,))],
            "config.fusion.grid=(2,): expected two numbers, rows and columns of crops, from 1 to 8",
        ),
        (
            [("fusion.grid", (0, 2))],
            "config.fusion.grid=(0, 2): expected two numbers, rows and columns of crops, from 1 to 8",
        ),
        (
            [("fusion.grid", (2, 9))],
            "config.fusion.grid=(2, 9): expected two numbers, rows and columns of crops, from 1 to 8",
        ),
        (
            [("fusion.grid", (1, 1))],
            "config.fusion.grid=(1, 1) is one crop of the low-res view's own size, which adds nothing; "
            "choose a config.fusion.name that reads the low-res view alone",
        ),
        ([("vision.mean", (0.5, 0.5))], "config.vision.mean and .std: expected three numbers each"),
        ([("vision.std", ())], "config.vision.mean and .std: expected three numbers each"),
        ([("run_stages", ())], "config.run_stages is empty: name at least one stage"),
        (
            [("run_stages", ("algin",)), ("stages", {"align": {}})],
            "config.run_stages names 'algin', which is not in config.stages; did you mean 'align'?; known: align",
        ),
        (
            [("stages.align.batch_size", 10), ("stages.align.accumulate", 4)],
            "config.stages.align.batch_size=10 is not a multiple of config.stages.align.accumulate=4",
        ),
        (
            [("stages.align.epochs", 0.0)],
            "config.stages.align: epochs=0.0 and max_steps=0 train nothing",
        ),
        ([("stages.align.lr", 0.0)], "config.stages.align.lr=0.0: expected a positive number"),
        ([("stages.align.lr", float("nan"))], "config.stages.align.lr=nan: expected a finite number"),
        (
            [("stages.align.warmup", 1.0)],
            "config.stages.align.warmup=1.0: expected a share of the steps, 0 to below 1",
        ),
        (
            [("stages.align.warmup", -0.1)],
            "config.stages.align.warmup=-0.1: expected a share of the steps, 0 to below 1",
        ),
        (
            [("stages.align.trainable", ("llm/.*", "*"))],
            "config.stages.align.trainable has '*', which is not a valid regular expression: nothing to repeat at position 0",
        ),
        *(
            ([("profile", text)], f"config.profile='{text}': expected START:STOP in optimizer steps, START before STOP")
            for text in ("5", "5:5", "6:5", "-1:5", "a:b", "1:2:3", "5:")
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, expected):
    assert sentence(*settings) == expected


LONGROPE = {"kind": "longrope", "original_length": 64, "short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 64}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"kind": "linear", "factor": 0.0}, "factor=0.0: expected a positive number"),
        ({"kind": "linear", "factor": -2.0}, "factor=-2.0: expected a positive number"),
        (LLAMA3 | {"factor": 0.0}, "factor=0.0: expected a positive number"),
        (LLAMA3 | {"original_length": 0}, "original_length=0: expected a positive number"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor=4.0: expected less than high_freq_factor=4.0"),
        (LONGROPE | {"original_length": 0}, "original_length=0: expected a positive number"),
        (LONGROPE | {"original_length": 1}, "original_length=1: expected more than 1"),
        (LONGROPE | {"short_factor": (1.0,)}, "short_factor=(1.0,): expected 8 numbers"),
        (LONGROPE | {"long_factor": ()}, "long_factor=(): expected 8 numbers"),
        (LONGROPE | {"long_factor": (0.0,) * 8}, "long_factor=0.0: expected a positive number"),
        (LONGROPE | {"attention_factor": 0.0}, "attention_factor=0.0: expected a positive number"),
        (
            {"kind": "linear", "factor": 2.0, "attention_factor": 1.5},
            "attention_factor=1.5: expected 1.0, since kind='linear' does not use it",
        ),
    ],
)
def test_rope_is_checked_as_one_of_a_config_json_is(rope, expected):
    settings = [(f"llm.rope.{key}", value) for key, value in rope.items()]
    assert sentence(*settings) == f"config.llm.rope.{expected}"


@pytest.mark.parametrize("rope", [LLAMA3, LONGROPE, {"kind": "linear", "factor": 0.5}])
def test_rope_that_is_right(rope):
    assert check(changed(*((f"llm.rope.{key}", value) for key, value in rope.items()))).llm.rope.kind == rope["kind"]


@pytest.mark.parametrize("length, images", [(16, 1), (48, 3)])
def test_room_beside_the_images(length, images):
    """Checked apart from the rest: a pretrained tower may change the number of its tokens."""
    raw = default()
    raw.data.max_images, raw.stages.align.seq_len = images, length + 1
    check_room(check(raw))
    raw.stages.align.seq_len = length
    with pytest.raises(UserError) as error:
        check_room(check(raw))
    expected = f"config.stages.align.seq_len={length} leaves no room for text beside {length} image tokens"
    assert str(error.value) == expected


def test_a_regex_of_init_parts_is_checked_too():
    assert "config.init_parts has 'llm/(', which is not a valid regular expression" in sentence(
        ("init_parts", ("llm/(",))
    )


def test_name_of_a_stage_is_text():
    with pytest.raises(UserError, match="config.stages"):
        check({"stages": {1: {}}})


def test_what_is_just_right():
    cfg = check(
        changed(
            ("stages.align.seq_len", 17),
            ("stages.align.warmup", 0.0),
            ("stages.align.epochs", 0.0),
            ("stages.align.max_steps", 1),
            ("profile", "5:6"),
            ("fusion.name", "cross_attention"),
            ("vision.width", 128),
        )
    )
    assert cfg.stages["align"] == StageConfig(seq_len=17, warmup=0.0, epochs=0.0, max_steps=1)


def test_positions_of_an_image():
    assert ways.positions(Config()) == 16
    assert ways.positions(check(changed(("vision.image_size", 336), ("vision.patch_size", 14)))) == 576


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"size": 1, "rate": 0.5, "name": "a", "smoke": False}),
        ("smoke", {"size": 1, "rate": 0.5, "name": "a", "smoke": True}),
        ("smoke=False", {"size": 1, "rate": 0.5, "name": "a", "smoke": False}),
        ("smoke=0,size=3", {"size": 3, "rate": 0.5, "name": "a", "smoke": False}),
        (" size=3 , smoke=true,", {"size": 3, "rate": 0.5, "name": "a", "smoke": True}),
        ("rate=1,name=b=c", {"size": 1, "rate": 1.0, "name": "b=c", "smoke": False}),
    ],
)
def test_variant_arguments(text, expected):
    arguments = variant_arguments(text, size=1, rate=0.5, name="a", smoke=False)
    assert arguments.to_dict() == expected
    assert type(arguments.rate) is float


def test_a_tuple_lists_the_values_of_a_variant_argument():
    assert variant_arguments("", stage=("first", "last")).stage == "first"
    assert variant_arguments("stage=last", stage=("first", "last")).stage == "last"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smoek", "config variant 'smoek' is not known; did you mean 'smoke'?; known: size, smoke, stage"),
        ("qqq=1", "config variant 'qqq' is not known; known: size, smoke, stage"),
        ("smoke=maybe", "config variant smoke='maybe': expected True or False"),
        ("size=1.5", "config variant size='1.5': expected int"),
        ("size", "config variant size='': expected int"),
        ("stage=lastt", "config variant stage='lastt': expected first or last; did you mean 'last'?"),
    ],
)
def test_wrong_variant_arguments(text, expected):
    with pytest.raises(UserError) as caught:
        variant_arguments(text, size=1, smoke=False, stage=("first", "last"))
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.seed", "3"),
        ("config.stages.align.lr", "1e-3"),
        ("config.vision.pre_norm", "True"),
        ("config.run_stages", "('align',)"),
        ("config.dtype", "float32"),
    ],
)
def test_good_override(name, value):
    assert check_override(name, value) is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("config.sead", "3", "config.sead is not a setting; did you mean 'seed'?; known: "),
        ("config.stages.align.lrr", "3", "config.stages.align.lrr is not a setting; did you mean 'lr'?; known: "),
        ("config.seed.more", "3", "config.seed.more is not a setting; config.seed has no settings of its own"),
        ("config.vision", "3", "config.vision is a group of settings; set one of them, config.vision.KEY=value"),
        ("config.stages", "3", "config.stages is a group of settings; set one of them, config.stages.KEY=value"),
        ("config.seed", "1.5", "config.seed='1.5': expected int"),
        ("config.stages.align.lr", "fast", "config.stages.align.lr='fast': expected float"),
        ("config.vision.pre_norm", "maybe", "config.vision.pre_norm='maybe': expected True or False"),
    ],
)
def test_wrong_override(name, value, expected):
    with pytest.raises(UserError) as caught:
        check_override(name, value)
    assert str(caught.value).startswith(expected)
