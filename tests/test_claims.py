"""Who is right where the user and a source's config.json differ: flags win, or are refused; config files give way."""

import pytest

from sparsecut_jax import config
from sparsecut_jax.models.shortcuts import wire_shortcuts
from sparsecut_jax.weights.claims import adopt, differences
from sparsecut_jax.weights.pretrained import open_sources
from test_pretrained import CLIP, LLAMA, LLAVA, LLM, PROJECTOR, SPARSECUT, VISION, WHOLE, checkpoint
from tiny import refusal

RELEASED = {
    "mm_projector_type": "cross_mlp", "mm_vision_select_layer": -3, "vit_levels": [0, 2], "llm_layers": [1, 4],
    "feature_order_reverse": False,
}  # fmt: skip
LINEAR = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}
KINDS = {
    "fusion": (RELEASED, PROJECTOR), "model": (SPARSECUT, *WHOLE), "llava": (LLAVA, *WHOLE), "llm": (LLAMA, LLM),
    "linear": (LINEAR, LLM), "vision": (CLIP, VISION),
}  # fmt: skip
PART_OF = {"llava": "model", "linear": "llm"}


def asked(tmp_path, kind: str, flags: dict, file: dict | None = None):
    """(what the user asks for, its sources, config.json): one source, flags over a config file that says `file`."""
    raw = config.default()
    part = PART_OF.get(kind, kind)
    path = checkpoint(tmp_path, *KINDS[kind])
    for key, value in {f"init.{part}": path, **(file or {}), **flags}.items():
        *groups, name = key.split(".")
        group = raw
        for each in groups:
            group = group[each]
        group[name] = value
    cfg = config.asked(raw, flags)
    return cfg, open_sources(cfg.init), f"{path}/config.json"


def plan_of(tmp_path, kind: str, flags: dict, file: dict | None = None):
    cfg, sources, _ = asked(tmp_path, kind, flags, file)
    cfg = adopt(cfg, sources)
    return wire_shortcuts(cfg.shortcuts, 5, 6, cfg.vision.select_layer)


BESIDE = ((0, 1), (2, 4))  # what the projector's config.json says
EXPLICIT = {"shortcuts.density": "explicit"}


@pytest.mark.parametrize(
    ("flags", "pairs", "position", "main"),
    [
        ({}, BESIDE, "pre", 2),
        ({"shortcuts.density": "none"}, (), "pre", 2),
        ({"shortcuts.density": "dense"}, ((4, 0), (3, 1), (2, 3), (1, 4), (0, 5)), "pre", 2),
        ({"shortcuts.count": 2}, ((4, 0), (0, 5)), "pre", 2),
        ({"shortcuts.order": "parallel"}, ((0, 0), (2, 3), (4, 5)), "pre", 2),
        ({"shortcuts.distribution": "top"}, ((4, 3), (2, 4), (0, 5)), "pre", 2),
        ({"shortcuts.position": "post"}, BESIDE, "post", 2),
        ({"shortcuts.feature_order_reverse": True}, ((4, 1), (2, 4)), "pre", 0),
        ({"vision.select_layer": -1}, BESIDE, "pre", 4),
        (EXPLICIT, BESIDE, "pre", 2),
        (EXPLICIT | {"shortcuts.llm_layers": (0, 5)}, ((0, 0), (2, 5)), "pre", 2),
        (EXPLICIT | {"shortcuts.vit_levels": (3,), "shortcuts.llm_layers": (5,)}, ((3, 5),), "pre", 2),
    ],
)
def test_an_ablation_on_a_released_projector_trains_the_plan_of_the_flags(tmp_path, flags, pairs, position, main):
    """What the config file says of the plan counts as well, once a flag has taken it from the projector."""
    made = plan_of(tmp_path, "fusion", flags, {"shortcuts.count": 3})
    assert (made.pairs, made.position, made.main_level) == (pairs, position, main)


@pytest.mark.parametrize("kind", ["model", "llava"])
def test_so_does_one_on_a_whole_model(tmp_path, kind):
    file = {"shortcuts.count": 2}
    assert plan_of(tmp_path, kind, {"shortcuts.density": "none"}, file).pairs == ()
    assert plan_of(tmp_path, kind, {"shortcuts.density": "sparse"}, file).pairs == ((4, 0), (0, 5))
    made = plan_of(tmp_path, kind, {}, file)
    assert (made.pairs, made.position) == ((((2, 1), (0, 4)), "post") if kind == "model" else ((), "pre"))


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("model", {"data.image_fit": "squash", "vision.select_layer": -1}),
        ("model", {"fusion.grid": (1, 3)}),  # cross_attention has no weights of the grid's size
        ("vision", {"vision.mean": (0.5, 0.5, 0.5), "vision.activation": "gelu", "vision.norm_eps": 1e-6}),
        ("llm", {"llm.rope_theta": 1e6, "llm.sliding_window": 16, "llm.max_positions": 128}),
        ("llm", {"llm.rope.kind": "linear", "llm.rope.factor": 2.0}),
        ("linear", {"llm.rope.factor": 2.0}),
    ],
)
def test_a_flag_wins_where_the_weights_leave_the_choice(tmp_path, kind, flags):
    cfg, sources, file = asked(tmp_path, kind, flags)
    found = adopt(cfg, sources)
    lines = differences(cfg, sources)
    for key, value in flags.items():
        group = found
        for name in key.split("."):
            group = getattr(group, name)
        assert group == value
        assert sum(line.startswith(f"kept       config.{key}={value!r} as given; {file} says ") for line in lines) == 1
    assert len(lines) == len(flags)


@pytest.mark.parametrize(
    ("kind", "flag", "value", "theirs", "hint"),
    [
        ("vision", "vision.width", 48, 24, ""),
        ("vision", "vision.image_size", 40, 20, "; config.init.image_size sets another size"),
        ("vision", "vision.class_token", False, True, ""),
        ("llm", "llm.layers", 3, 6, ""),
        ("llm", "llm.vocab_size", 128, 96, ""),
        ("llm", "llm.tie_embeddings", True, False, ""),
        ("llm", "llm.family", "mistral", "llama", ""),
        ("fusion", "fusion.name", "mlp", "channel", ""),
        ("model", "fusion.name", "channel", "cross_attention", ""),
        ("model", "fusion.shared", True, False, ""),
        ("llava", "fusion.name", "channel", "mlp", ""),
    ],
)
def test_a_flag_that_the_weights_contradict_is_refused(tmp_path, kind, flag, value, theirs, hint):
    cfg, sources, file = asked(tmp_path, kind, {flag: value})
    assert refusal(adopt, cfg, sources) == (
        f"config.{flag}={value!r} contradicts the weights of {file}, where it is {theirs!r}; leave it out{hint}"
    )


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("llm", {"llm.width": 32, "llm.layers": 6}),
        ("llm", {"llm.vocab_size": 0}),
        ("vision", {"vision.image_size": 40, "init.image_size": 40}),
        ("fusion", {"fusion.name": "channel", "fusion.grid": (1, 2), "vision.select_layer": -3}),
    ],
)
def test_flags_that_agree(tmp_path, kind, flags):
    cfg, sources, _ = asked(tmp_path, kind, flags)
    adopt(cfg, sources)
    assert differences(cfg, sources) == []


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("llm", {"llm.rope.factor": 2.0},
         "config.llm.rope.factor=2.0 has no effect with config.llm.rope.kind='default'; leave it out, or set that to "
         "linear or llama3"),
        ("linear", {"llm.rope.factor": 0.0}, "config.llm.rope.factor=0.0: expected a positive number"),
        ("fusion", {"shortcuts.vit_levels": (1,)},
         "config.shortcuts.vit_levels=(1,) has no effect with config.shortcuts.density='sparse'; leave it out, or set "
         "that to 'explicit'"),
        ("llava", {"shortcuts.position": "post"},
         "config.shortcuts.position='post' has no effect with config.shortcuts.density='none'; leave it out"),
        ("llava", {"fusion.grid": (1, 3)},
         "config.fusion.grid=(1, 3) has no effect with config.fusion.name='mlp', which reads no crops; leave it out"),
    ],
)  # fmt: skip
def test_flags_without_effect_on_what_the_files_say(tmp_path, kind, flags, expected):
    cfg, sources, _ = asked(tmp_path, kind, flags)
    assert refusal(adopt, cfg, sources) == expected


def test_a_config_file_gives_way_and_it_is_said(tmp_path):
    changes = {"llm.width": 48, "llm.rope_theta": 1e6, "llm.layers": 6}
    cfg, sources, path = asked(tmp_path, "llm", {}, changes)
    found = adopt(cfg, sources)
    assert (found.llm.width, found.llm.rope_theta) == (32, 5e4)
    assert differences(cfg, sources) == [
        f"replaced   by {path}: llm.width=32, not 48; llm.rope_theta=50000.0, not 1000000.0"
    ]


def test_a_config_file_can_insist(tmp_path):
    cfg, sources, path = asked(
        tmp_path, "fusion", {}, {"init.keep": ("shortcuts.density",), "shortcuts.density": "none"}
    )
    assert adopt(cfg, sources).shortcuts.density == "none"
    assert differences(cfg, sources) == [f"kept       config.shortcuts.density='none' as given; {path} says 'explicit'"]


def test_a_plan_of_which_the_file_does_not_speak(tmp_path):
    cfg, sources, path = asked(tmp_path, "fusion", {"shortcuts.count": 3})
    assert differences(cfg, sources) == [f"kept       config.shortcuts.count=3 as given; {path} has a plan of its own"]
