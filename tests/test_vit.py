"""The vision tower hands out the output of any of its blocks."""

import dataclasses

import jax
import numpy as np
import pytest

import reference
from sparsecut_jax.models.vit import VisionTower
from tiny import N, params_of, tiny_config

CFG = tiny_config().vision
IMAGES = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)


def run(cfg, levels, params):
    return jax.jit(VisionTower(cfg, levels).apply)({"params": params}, IMAGES)


def tower(levels, **changes):
    cfg = dataclasses.replace(CFG, **changes)
    return cfg, params_of(VisionTower(cfg, levels), IMAGES)


@pytest.mark.parametrize("levels", [(3, 0, 2), (4,), (0,)])
def test_levels_come_in_the_order_asked_for(levels):
    cfg, params = tower(levels)
    expected = reference.tower(params, IMAGES, cfg, max(levels) + 1)
    out = run(cfg, levels, params)
    assert out.shape == (len(levels), 2, N, 24)
    for k, level in enumerate(levels):
        np.testing.assert_allclose(out[k], expected[level], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("changes", [dict(class_token=False), dict(pre_norm=False, patch_bias=True, norm_eps=1e-2)])
def test_other_towers(changes):
    cfg, params = tower((1, 0), **changes)
    expected = reference.tower(params, IMAGES, cfg, 2)
    np.testing.assert_allclose(run(cfg, (1, 0), params), [expected[1], expected[0]], rtol=1e-5, atol=2e-5)


def test_parameters():
    """Blocks 0 to 2 for level 2: none above the highest level, and no post-layernorm."""
    _, params = tower((2, 0))
    qkv = {f"{n}_kernel": (3, 24, 2, 12) for n in "qkv"} | {f"{n}_bias": (3, 2, 12) for n in "qkv"}
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "patch_embedding": {"kernel": (48, 24)},
        "class_embedding": (24,),
        "position_embedding": (10, 24),
        "pre_norm": {"scale": (24,), "bias": (24,)},
        "blocks": {
            "norm1": {"scale": (3, 24), "bias": (3, 24)},
            "attention": {**qkv, "out_kernel": (3, 2, 12, 24), "out_bias": (3, 24)},
            "norm2": {"scale": (3, 24), "bias": (3, 24)},
            "fc1": {"kernel": (3, 24, 40), "bias": (3, 40)},
            "fc2": {"kernel": (3, 40, 24), "bias": (3, 24)},
        },
    }


def test_parameters_without_class_token():
    _, params = tower((0,), class_token=False, pre_norm=False, patch_bias=True)
    assert set(params) == {"patch_embedding", "position_embedding", "blocks"}
    assert params["position_embedding"].shape == (9, 24)
    assert params["patch_embedding"]["bias"].shape == (24,)


@pytest.mark.parametrize("changes", [dict(scan_layers=False), dict(remat=True)])
def test_unrolled_and_remat_are_the_same_function(changes):
    """Outputs and gradients; the parameters are shared, so their tree is the same too."""
    levels = (2, 0)
    cfg, params = tower(levels)

    def loss(params, cfg):
        out = VisionTower(cfg, levels).apply({"params": params}, IMAGES)
        return (out * np.linspace(-1, 1, out.size).reshape(out.shape)).sum() / out.size

    plain = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, other = plain(params, cfg), plain(params, dataclasses.replace(cfg, **changes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, other)


def test_an_image_does_not_see_the_others():
    cfg, params = tower((1,))
    both = run(cfg, (1,), params)
    swapped = jax.jit(VisionTower(cfg, (1,)).apply)({"params": params}, IMAGES[::-1])
    np.testing.assert_allclose(both[:, ::-1], swapped, rtol=0, atol=1e-6)
