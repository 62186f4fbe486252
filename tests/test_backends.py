"""What "auto" becomes on each platform, and what a platform refuses."""

import pytest

from sparsecut_jax.runtime import backends
from tiny import refusal, tiny_config


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("cpu", ("tiled", "none", "none", "none", "float32")),
        ("gpu", ("cudnn", "full", "full", "full", "bfloat16")),
        ("tpu", ("splash", "full", "full", "full", "bfloat16")),
    ],
)
def test_auto(platform, expected):
    cfg = backends.resolve(tiny_config(), platform)
    assert (cfg.attention, cfg.vision.remat, cfg.fusion.remat, cfg.llm.remat, cfg.dtype) == expected
    assert backends.resolve(cfg, platform) == cfg
    assert backends.compute_dtype(cfg).name == expected[4]


def test_what_is_given_stays():
    cfg = tiny_config(
        llm=dict(remat="dots"),
        vision=dict(remat="none"),
        fusion=dict(remat="none"),
        top=dict(attention="xla", dtype="float32"),
    )
    assert backends.resolve(cfg, "tpu") == cfg


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        (
            "cpu",
            dict(attention="splash"),
            "config.attention='splash' does not run on cpu; expected tiled or xla, or auto",
        ),
        (
            "gpu",
            dict(attention="tiled"),
            "config.attention='tiled' does not run on gpu; expected cudnn or xla, or auto",
        ),
        (
            "tpu",
            dict(attention="cudnn"),
            "config.attention='cudnn' does not run on tpu; expected splash or xla, or auto",
        ),
        (
            "gpu",
            dict(attention="cudnn", dtype="float32"),
            "config.attention='cudnn' computes in bfloat16, but config.dtype is float32; expected 'xla' or 'auto'",
        ),
    ],
)
def test_attention_that_the_platform_lacks(platform, changes, expected):
    assert refusal(backends.resolve, tiny_config(top=changes), platform) == expected


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_a_cpu_offloads_nowhere(part):
    cfg = tiny_config(**{part: dict(remat="offload")})
    assert refusal(backends.resolve, cfg, "cpu") == (
        f"config.{part}.remat='offload' moves activations to host memory, where a CPU already has them; "
        "expected none, dots, full or auto"
    )
    assert getattr(backends.resolve(cfg, "tpu"), part).remat == "offload"
    assert getattr(backends.resolve_for_inference(cfg, "cpu"), part).remat == "none"


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_the_fused_kernels_cannot_do(platform):
    """auto takes the plain attention, the kernel's own name is refused."""
    name = backends.ATTENTION[platform][0]
    windows = dict(sliding_window=8, sliding_from=2)
    assert backends.resolve(tiny_config(), platform, branched=True).attention == "xla"
    assert backends.resolve(tiny_config(llm=windows), platform).attention == "xla"
    assert backends.resolve(tiny_config(llm=dict(sliding_window=8)), platform).attention == name
    asked = dict(attention=name)
    assert refusal(backends.resolve, tiny_config(top=asked), platform, True) == (
        f"config.attention={name!r} cannot mask independent questions of one image (rows with "
        "\"independent\": true); expected 'xla' or 'auto'"
    )
    assert refusal(backends.resolve, tiny_config(llm=windows, top=asked), platform) == (
        f"config.attention={name!r} needs one window for all layers, but config.llm.sliding_from=2; expected 'xla' or 'auto'"
    )


def test_a_run_of_another_platform_can_be_asked():
    cfg = tiny_config(top=dict(attention="splash"), llm=dict(remat="offload"))
    assert backends.resolve_for_inference(cfg, "cpu").attention == "tiled"
