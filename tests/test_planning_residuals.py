"""What is kept between forward and backward pass, by hand."""

import dataclasses

import pytest
from flax import linen as nn

from planning_configs import load
from sparsecut_jax.models.layers import fan_in, weight
from sparsecut_jax.planning import memory
from sparsecut_jax.planning.residuals import Kept, Residuals
from sparsecut_jax.runtime import backends, sharding


def decoder(cfg, stage, **llm):
    return Residuals(dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, **llm)), stage).decoder


def test_what_the_decoder_keeps():
    """full: each layer's input; dots: also what its seven matrices give; none: more; offload: nothing here."""
    cfg, stage = load("sparsecut", "size=7b,stage=finetune")
    cfg = backends.resolve(cfg, "tpu")
    kept = {remat: decoder(cfg, stage, remat=remat) for remat in ("full", "dots", "none", "offload")}
    numbers, layers = 2048 * 4096, 32
    assert kept["full"].each == pytest.approx(layers * 2 * numbers, rel=1e-3)
    assert kept["dots"].each == pytest.approx(layers * 2 * (numbers * (1 + 3 + 1) + 2 * 2048 * 11008), rel=1e-3)
    assert max(kept["full"].copies, kept["dots"].copies) < 2**16
    assert kept["none"].each > 2 * kept["dots"].each
    assert kept["none"].copies == pytest.approx(layers * 2 * (4 * 4096**2 + 3 * 4096 * 11008), rel=0.01)
    assert kept["offload"] == Kept(0, 0)
    half = decoder(cfg.with_stage(stage, seq_len=1024), stage, remat="dots")
    assert half.each == pytest.approx(kept["dots"].each / 2, rel=1e-3)
    assert Residuals(cfg, stage).layer == pytest.approx(kept["none"].each / layers, rel=0.03)


def test_frozen_layers_keep_less():
    cfg, stage = load("sparsecut", "size=7b,stage=finetune")
    frozen, align = load("sparsecut", "size=7b,stage=pretrain")
    of = lambda cfg, stage: decoder(backends.resolve(cfg, "tpu"), stage, remat="none")
    assert of(frozen, align).each < 0.8 * of(cfg, stage).each
    assert of(frozen, align).copies < 32 * 2**16


class Odd(nn.Module):
    """A fusion that nobody knows: two matrices, 100 numbers a token between them."""

    width: int
    grid: tuple[int, ...]

    @nn.compact
    def __call__(self, level):
        weights = [weight(self, name, shape, (None, None), fan_in(8)) for name, shape in (
            ("a", (level.shape[-1], 100)), ("b", (100, self.width)),
        )]  # fmt: skip
        return level[:, 0] @ weights[0].astype(level.dtype) @ weights[1].astype(level.dtype)


def test_any_fusion(monkeypatch):
    """It keeps the inputs of its matrices, in float32; the bank has a row for each level but the main one."""
    monkeypatch.setattr("sparsecut_jax.models.fusing.channel.Channel", Odd)
    cfg, stage = load("base", llm__vocab_size=520, fusion__remat="none", stage__trainable=("fusion/.*",))
    cfg = backends.resolve(cfg, "cpu")
    levels, tokens = 1 + cfg.shortcuts.count, (cfg.vision.image_size // cfg.vision.patch_size) ** 2
    assert Residuals(cfg, stage).encoder == Kept(4 * levels * tokens * (cfg.vision.width + 100), 0)
    assert Residuals(cfg, stage).bank == 4 * cfg.shortcuts.count * tokens * cfg.llm.width
    one = dict.fromkeys(sharding.MESH_AXES, 1)
    assert memory.estimate(cfg, stage, one, "cpu").activations > 0
