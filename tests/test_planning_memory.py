"""The analytic model of bytes against what compilers report, and its terms one by one."""

import json

import jax
import pytest
from flax import linen as nn

from planning_cases import BYTES, CASES
from planning_configs import load
from sparsecut_jax.models.layers import fan_in, weight
from sparsecut_jax.planning import memory, residuals
from sparsecut_jax.planning.compiling import lower_step
from sparsecut_jax.runtime import backends

ALL = [(platform, name) for platform, cases in CASES.items() for name in cases]
RECORDED = json.loads(BYTES.read_text()) if BYTES.exists() else {}
MESH = dict(replica=1, data=1, fsdp=8, tensor=1)


@pytest.mark.parametrize("platform, name", ALL)
def test_against_compilers(platform, name):
    """State within 2 %, temporaries within 20 %, on what constants were fitted to and on what they were not."""
    cfg, stage, sizes = CASES[platform][name].load(platform)
    found = memory.estimate(cfg, stage, sizes, platform)
    arguments, temporaries = RECORDED[platform][name]
    assert found.state == pytest.approx(arguments, rel=0.02)
    assert found.temporary == pytest.approx(temporaries, rel=0.20)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_most_cases_are_held_out(platform):
    held_out = [case for case in CASES[platform].values() if not case.fitted]
    assert len(held_out) >= 6 and len(held_out) > len(CASES[platform]) / 2


def test_what_the_compiler_says_today():
    """One of the cases, compiled now: what is recorded is still true."""
    case = CASES["cpu"]["base on eight"]
    cfg, stage, sizes = case.load("cpu")
    found = lower_step(cfg, stage, jax.devices()).compile().memory_analysis()
    ours = memory.estimate(cfg, stage, sizes, "cpu")
    assert ours.state == pytest.approx(found.argument_size_in_bytes, rel=0.02)
    assert ours.temporary == pytest.approx(found.temp_size_in_bytes, rel=0.20)


# --- terms ---


def estimate(platform="gpu", sizes=MESH, **changes):
    cfg, stage = load("siglip_qwen", "stage=finetune", stage__batch_size=16, stage__buckets=(), **changes)
    return memory.estimate(backends.resolve(cfg, platform), stage, sizes, platform)


def test_state_by_hand():
    """What is trained: float32 and two moments; what is not: bfloat16, but for its norms and biases."""
    cfg, stage = load("siglip_qwen", "stage=finetune", stage__batch_size=16, stage__buckets=())
    found = memory.Parameters(backends.resolve(cfg, "gpu"), stage)
    count = lambda part: found.local(dict.fromkeys(MESH, 1), lambda path: path.startswith(part), "int8")
    trained, tower = count("fusion") + count("llm"), count("vision")
    ours = estimate()
    assert ours.optimizer == pytest.approx(8 * trained / 8, rel=1e-3)
    assert ours.gradients == ours.optimizer / 2
    assert ours.parameters == pytest.approx((4 * trained + 2 * tower) / 8, rel=5e-3)
    assert ours.batch == 2 * (5 * 384 * 384 * 3 + 2048 * 13 + 4)


def test_meshes():
    """Copies over data do not split the state; fsdp and tensor do, and leave smaller and larger matrices to gather."""
    split, copied = estimate(), estimate(sizes={**MESH, "data": 4, "fsdp": 2})
    assert copied.optimizer == pytest.approx(4 * split.optimizer, rel=1e-3)
    assert estimate(sizes={**MESH, "fsdp": 4, "tensor": 2}).optimizer == pytest.approx(split.optimizer, rel=1e-2)


def test_turns_take_a_second_copy_of_the_gradients_and_fewer_activations():
    once, turns = estimate(), estimate(stage__accumulate=2)
    assert turns.gradients == 2 * once.gradients
    assert turns.activations == pytest.approx(once.activations / 2, rel=1e-3)


def test_what_the_decoder_keeps():
    """full: each layer's input; dots: also what its seven matrices give; none: more; offload: nothing here."""
    cfg, stage = load("sparsecut", "size=7b,stage=finetune")
    cfg = backends.resolve(cfg, "tpu")
    kept = {remat: residuals.decoder(cfg, stage, 2048, remat=remat) for remat in ("full", "dots", "none", "offload")}
    numbers, layers = 2048 * 4096, 32
    assert kept["full"].each == pytest.approx(layers * 2 * numbers, rel=1e-3)
    assert kept["dots"].each == pytest.approx(layers * 2 * (numbers * (1 + 3 + 1) + 2 * 2048 * 11008), rel=1e-3)
    assert max(kept["full"].copies, kept["dots"].copies) < 2**16
    assert kept["none"].each > 2 * kept["dots"].each
    assert kept["none"].copies == pytest.approx(layers * 2 * (4 * 4096**2 + 3 * 4096 * 11008), rel=0.01)
    assert kept["offload"] == residuals.Kept(0, 0)
    half = residuals.decoder(cfg, stage, 1024, remat="dots")
    assert half.each == pytest.approx(kept["dots"].each / 2, rel=1e-3)
    assert residuals.layer(cfg, stage, 2048).each == pytest.approx(kept["none"].each / layers, rel=0.03)


def test_frozen_layers_keep_less():
    cfg, stage = load("sparsecut", "size=7b,stage=finetune")
    frozen, align = load("sparsecut", "size=7b,stage=pretrain")
    of = lambda cfg, stage: residuals.decoder(backends.resolve(cfg, "tpu"), stage, 2048, remat="none")
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
    assert residuals.encoder(cfg, stage) == residuals.Kept(4 * levels * tokens * (cfg.vision.width + 100), 0)
    assert residuals.bank(cfg, stage) == 4 * cfg.shortcuts.count * tokens * cfg.llm.width
    assert memory.estimate(cfg, stage, dict.fromkeys(MESH, 1), "cpu").activations > 0
