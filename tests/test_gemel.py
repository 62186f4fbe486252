"""`gemel` against a reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.ways import positions, wiring_of
from sparsecut_jax.training.report import count
from tiny import params_of, refusal, tiny_config


def config_of(tokens=3, **groups):
    return tiny_config(fusion=dict(name="gemel", gemel=dict(tokens=tokens)), **groups)


def test_equals_the_reference():
    cfg = config_of()
    assert (positions(cfg), wiring_of(cfg).levels) == (3, (3,))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    levels = np.random.default_rng(0).standard_normal((1, 2, 1, 9, 24)).astype(np.float32)
    params = params_of(module, levels)
    fused = jax.jit(module.apply)({"params": params}, levels)
    weights = reference.double(params)["fuse"]["fc"]
    for image in range(2):
        pooled = levels[0, image, 0].astype(np.float64).mean(0)
        for row in range(3):
            own = slice(32 * row, 32 * (row + 1))
            expected = pooled @ weights["kernel"][:, own] + weights["bias"][own]
            np.testing.assert_allclose(fused.tokens[image, row], expected, rtol=1e-5, atol=1e-5)


def test_parameters_of_the_original():
    cfg = config_of(4, vision=dict(width=1024, heads=16), llm=dict(width=4096))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 9, 1024))))
    assert count(shapes["params"]) == 16_793_600


@pytest.mark.parametrize("tokens", [0, 1025])
def test_a_length_that_cannot_be(tokens):
    assert refusal(config_of, tokens) == f"config.fusion.gemel.tokens={tokens}: expected 1 to 1024 positions"
