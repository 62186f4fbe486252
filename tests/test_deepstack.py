"""DeepStack against a reference in float64, written token by token."""

import jax
import numpy as np
import pytest

import reference
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.types import UserError
from tiny import params_of, tiny_config


def group_of(crops, grid, sampling, group):
    """Crops [r * s, N, C] -> the tokens [N, C] of a group."""
    (rows, columns), h = grid, 3
    token = lambda y, x: crops[y // h * columns + x // h, y % h * h + x % h]  # of the canvas
    if sampling == "grid":
        return crops[group]
    if sampling == "1d":
        flat = [token(y, x) for y in range(rows * h) for x in range(columns * h)]
        return np.array(flat[group :: rows * columns])
    i, j = divmod(group, columns)
    return np.array([token(y * rows + i, x * columns + j) for y in range(h) for x in range(h)])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "sampling, grid", [("2d", (2, 2)), ("1d", (2, 2)), ("grid", (2, 2)), ("2d", (1, 2)), ("1d", (1, 2))]
)
def test_equals_the_reference(sampling, grid, shared):
    cfg = tiny_config(fusion=dict(name="deepstack", grid=grid, shared=shared, deepstack=dict(sampling=sampling)))
    module, count = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm), grid[0] * grid[1]
    levels = np.random.default_rng(0).standard_normal((1, 2, 1 + count, 9, 24)).astype(np.float32)
    params = params_of(module, levels)
    fused = jax.jit(module.apply)({"params": params}, levels)
    weights, level = reference.double(params), levels[0].astype(np.float64)
    high = weights["projector" if shared else "crop_projector"]
    for image in range(2):
        low = reference.project(weights["projector"], level[image, 0])
        np.testing.assert_allclose(fused.tokens[image], low, rtol=1e-5, atol=1e-5)
        for group in range(count):
            expected = reference.project(high, group_of(level[image, 1:], grid, sampling, group))
            np.testing.assert_allclose(fused.bank[group, image], expected, rtol=1e-5, atol=1e-5)


def test_layers():
    wiring = wiring_of(tiny_config(fusion=dict(name="deepstack", deepstack=dict(start=0, interval=2))))
    assert wiring.entering == ((0,), (), (1,), (), (2,), (), (3,))
    assert (wiring.names, wiring.positions) == (("group0", "group1", "group2", "group3"), 9)
    assert wiring_of(tiny_config(fusion=dict(name="deepstack"))).entering == ((), (0,), (1,), (2,), (3,), (), ())


def test_a_layer_that_does_not_exist():
    with pytest.raises(UserError, match="puts 4 groups into layers 4 to 7, but the LLM has layers 0 to 6"):
        wiring_of(tiny_config(fusion=dict(name="deepstack", deepstack=dict(start=4))))


def test_settings_of_shortcuts_do_not_matter():
    """Not even those that are impossible: eight levels of a tower of five blocks, in reverse."""
    other = dict(count=8, feature_order_reverse=True)
    assert wiring_of(tiny_config(fusion=dict(name="deepstack"), shortcuts=other)).levels == (3,)
