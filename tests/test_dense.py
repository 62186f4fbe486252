"""Dense Connector against a reference in float64."""

import jax
import numpy as np
import pytest

import reference
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.types import UserError
from tiny import params_of, tiny_config


def config_of(kind, depth=5, **groups):
    vision = dict(image_size=16, layers=depth)  # 4 x 4 tokens
    return tiny_config(fusion=dict(name="dense", dense=dict(kind=kind)), vision=vision, **groups)


@pytest.mark.parametrize(
    "depth, kind, levels",
    [
        (24, "sti", (22, 6, 14)),  # hs[-2], hs[7], hs[15]
        (24, "sci", (22, 6, 14)),
        (24, "dci", (22, *range(-1, 23))),  # hs[-2]; hs[0..11] and hs[12..23]
        (27, "dci", (25, *range(-1, 25))),  # hs[0..12] and hs[13..25]
    ],
)
def test_levels(depth, kind, levels):
    assert wiring_of(config_of(kind, depth)).levels == levels


def test_positions():
    assert [wiring_of(config_of(kind)).positions for kind in ("sti", "sci", "dci")] == [20, 16, 16]


@pytest.mark.parametrize("kind", ["sti", "sci", "dci"])
def test_equals_the_reference(kind):
    cfg = config_of(kind)
    wiring = wiring_of(cfg)
    module = Fusion(cfg.fusion, wiring, cfg.llm)
    levels = np.random.default_rng(0).standard_normal((len(wiring.levels), 2, 1, 16, 24)).astype(np.float32)
    params = params_of(module, levels)
    fused = jax.jit(module.apply)({"params": params}, levels)
    assert fused.bank is None
    weights, exact = reference.double(params)["projector"], levels[:, :, 0].astype(np.float64)
    for image in range(2):
        main, *others = exact[:, image]
        if kind == "sti":
            runs = [np.array([level[:8].mean(0), level[8:].mean(0)]) for level in others]
            joined = np.concatenate([main, *runs], 0)
        elif kind == "sci":
            joined = np.concatenate([main, *others], 1)
        else:
            joined = np.concatenate([main, np.mean(others[:2], 0), np.mean(others[2:], 0)], 1)
        np.testing.assert_allclose(fused.tokens[image], reference.project(weights, joined), rtol=1e-5, atol=1e-5)


def test_tokens_that_cannot_be_averaged():
    with pytest.raises(UserError, match="averages runs of 8 tokens, but a view has 9"):
        wiring_of(tiny_config(fusion=dict(name="dense", dense=dict(kind="sti"))))
