"""`mlp` with as many parameters as another way: as near as a width can bring it, whatever the other settings."""

import dataclasses

import jax
import pytest

from sparsecut_jax.config import asked, default
from sparsecut_jax.exporting import export
from sparsecut_jax.models import ways
from sparsecut_jax.models.fusing.mlp import Settings, parameters
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.runs.parameters import boxed_shapes
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import sharding
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.training.report import count
from tiny import random_params, refusal, tiny_config

OTHERS = [name for name in ways.FUSING if name != "mlp"]
VISION = dict(image_size=16, width=32)  # 4 x 4 tokens


def config_of(match, shared=True, density="sparse", **settings):
    fusion = dict(name="mlp", mlp=dict(match=match, **settings), shared=shared)
    return tiny_config(fusion=fusion, vision=VISION, shortcuts=dict(density=density))


def size(cfg):
    """Parameters of the whole model's part "fusion"."""
    return count(boxed_shapes(build_model(cfg), 1)["fusion"])


def with_fusion(cfg, **changes):
    return dataclasses.replace(cfg, fusion=dataclasses.replace(cfg.fusion, **changes))


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_width_is_nearer(name):
    cfg = config_of(name)
    target = size(with_fusion(cfg, name=name, mlp=Settings()))
    hidden = wiring_of(cfg).hidden
    off = {width: abs(size(with_fusion(cfg, mlp=Settings(width))) - target) for width in range(hidden - 1, hidden + 2)}
    assert min(off, key=off.get) == hidden
    assert off[hidden] == abs(size(cfg) - target) <= (32 + 1 + 32) / 2


def test_sets_of_weights_for_each_level():
    """With `fusion.shared=False` both have one for the main feature and for each of three levels."""
    cfg = config_of("channel", shared=False)
    # channel: (5 x 32 + 1) x 32 + (32 + 1) x 32 = 6208; a hidden channel of mlp: 32 + 1 + 32 = 65, 32 biases besides
    assert wiring_of(cfg).hidden == 95
    assert size(cfg) == 4 * (95 * 65 + 32) == 24828
    assert size(with_fusion(cfg, name="channel")) == 4 * 6208 == 24832


@pytest.mark.parametrize("name", ["bcqlm", "cross_attention", "layalign", "mmfuser"])
def test_counts_on_a_mesh(name):
    """Also where devices outnumber the images and the heads whose shapes are traced."""
    cfg = with_fusion(config_of(name), name=name)
    expected = parameters(cfg)
    with jax.set_mesh(sharding.make_mesh({"data": 4, "tensor": 2})):
        assert parameters(cfg) == expected


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(match="mlp"), f"config.fusion.mlp.match='mlp': expected one of {', '.join(OTHERS)}"),
        (dict(match="chanel"), f"config.fusion.mlp.match='chanel': expected one of {', '.join(OTHERS)}"),
        (dict(match="", hidden=-1), "config.fusion.mlp.hidden=-1: expected 0 or more"),
        (
            dict(match="channel", hidden=7),
            "config.fusion.mlp.hidden=7 and .match='channel' both say how large the projector is; leave one of them out",
        ),
    ],
)
def test_what_cannot_be_matched(settings, sentence):
    assert refusal(config_of, **settings) == sentence


def test_settings_of_the_other_way_have_an_effect():
    raw = default()
    raw.fusion.update(name="mlp", grid=(2, 3))
    raw.fusion.mlp.match = "channel"
    assert wiring_of(asked(raw, ["fusion.grid"])).hidden > wiring_of(config_of("channel")).hidden
    raw.fusion.mlp.match = "dense"
    raw.fusion.dense.kind = "sci"
    sentence = (
        "config.fusion.grid=(2, 3) has no effect with config.fusion.name='mlp', which reads no crops; leave it out"
    )
    assert refusal(asked, raw, ["fusion.grid", "fusion.dense.kind"]) == sentence
    raw.fusion.grid = (2, 2)
    asked(raw, ["fusion.dense.kind"])


def test_is_not_written_as_llava(tmp_path):
    cfg = config_of("channel", density="none")
    model = build_model(cfg)
    params = random_params(boxed_shapes(model, 1))
    run = Run("runs/x", 7, cfg, sharding.make_mesh({}, jax.devices()[:1]), model, params, None, None)
    assert refusal(export.write, run, str(tmp_path), "llava", False) == (
        "this model cannot be written as llava: its projector has 95 hidden channels, LLaVA's as many as the LLM's width, 32; "
        "use --as=sparsecut"
    )
    assert export.portable(run, False)[0].fusion.mlp == Settings(hidden=95)
