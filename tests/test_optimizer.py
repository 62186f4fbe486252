"""What is trained, and how fast."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsecut_jax.settings import StageConfig
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.types import UserError

VISION = {"vision/pre_norm/scale": 1, "vision/blocks/fc1/kernel": 2, "vision/blocks/fc1/bias": 3}
FUSION = {"fusion/fuse/projector/fc1/kernel": 4}
LLM = {"llm/embedding": 5, "llm/layers/attention/q": 6}


def rates(steps, **settings):
    schedule = opt.schedule(StageConfig(**settings), steps)
    return [float(schedule(step)) for step in range(steps)]


def test_schedule():
    """Warm-up over 4 of 12 steps, from lr / 4 in equal parts; then half a cosine over the other 8."""
    expected = [0.25, 0.4375, 0.625, 0.8125]
    expected += [(1 + np.cos(np.pi * i / 8)) / 2 for i in range(8)]
    np.testing.assert_allclose(rates(12, lr=1.0, warmup=1 / 3), expected, rtol=1e-5)


def test_schedule_without_warmup():
    expected = [0.2 * (1 + np.cos(np.pi * i / 5)) / 2 for i in range(5)]
    np.testing.assert_allclose(rates(5, lr=0.2, warmup=0.0), expected, rtol=1e-5)


def test_schedule_with_a_floor():
    """The cosine ends at a tenth of lr."""
    expected = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    np.testing.assert_allclose(rates(4, lr=1.0, warmup=0.0, final_lr=0.1), expected, rtol=1e-5)
    np.testing.assert_allclose(opt.schedule(StageConfig(lr=1.0, warmup=0.0, final_lr=0.1), 4)(4), 0.1, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
def test_schedule_never_stands_still_at_zero(steps):
    """3 % of few steps is still one step of warm-up, and the first update moves."""
    values = rates(steps, lr=1.0, warmup=0.03)
    assert min(values) > 0 and max(values) <= 1
    assert max(values) == 1


def one_update(stage, grads, params):
    tx = opt.adamw(stage, MATRICES)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return updates, state


MATRICES = {"llm/head": True, "llm/norm/scale": False, "fusion/fuse/projector/fc1/kernel": True}
PAIR = {"llm/head": jnp.full((2,), 2.0), "llm/norm/scale": jnp.full((2,), 2.0)}


def test_adam_literal():
    """The first update is the gradient's sign, whatever its size; the second follows Adam's formula."""
    stage = StageConfig(clip_norm=0.0, b1=0.9, b2=0.99)
    tx = opt.adamw(stage, MATRICES)
    params = {"llm/head": jnp.zeros(2)}
    first, state = tx.update({"llm/head": jnp.array([0.3, -4.0])}, tx.init(params), params)
    np.testing.assert_allclose(first["llm/head"], [1, -1], rtol=1e-5)
    second, _ = tx.update({"llm/head": jnp.array([0.1, 4.0])}, state, params)
    m = (0.9 * 0.1 * np.array([0.3, -4.0]) + 0.1 * np.array([0.1, 4.0])) / (1 - 0.9**2)
    v = (0.99 * 0.01 * np.array([0.09, 16.0]) + 0.01 * np.array([0.01, 16.0])) / (1 - 0.99**2)
    np.testing.assert_allclose(second["llm/head"], m / np.sqrt(v), rtol=1e-5)


def test_weight_decay_is_decoupled_and_for_matrices():
    zero = jax.tree.map(jnp.zeros_like, PAIR)
    updates, _ = one_update(StageConfig(weight_decay=0.1), zero, PAIR)
    np.testing.assert_allclose(updates["llm/head"], [0.2, 0.2], rtol=1e-6)
    assert updates["llm/norm/scale"].tolist() == [0, 0]
    updates, _ = one_update(StageConfig(weight_decay=0.0), zero, PAIR)
    assert updates["llm/head"].tolist() == [0, 0]


@pytest.mark.parametrize("clip_norm, factor", [(1.0, 1 / 10), (5.0, 1 / 2), (20.0, 1.0), (0.0, 1.0)])
def test_clipping_is_by_the_norm_of_all_gradients(clip_norm, factor):
    """Norm of (1, 5, 5, 7) is 10; Adam's first moment shows what it was given."""
    grads = {"llm/head": jnp.array([1.0, 5.0]), "llm/norm/scale": jnp.array([5.0, 7.0])}
    _, state = one_update(StageConfig(clip_norm=clip_norm, b1=0.9), grads, PAIR)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moments["llm/head"], np.array([1.0, 5.0]) * factor * 0.1, rtol=1e-5)
    np.testing.assert_allclose(moments["llm/norm/scale"], np.array([5.0, 7.0]) * factor * 0.1, rtol=1e-5)


def test_part_norms():
    flat = {
        "llm/head": jnp.array([3.0]),
        "llm/layers/attention/q": jnp.array([[4.0]]),
        "fusion/fuse/x": jnp.array([2.0, -2.0, 1.0]),
    }
    assert {part: float(norm) for part, norm in opt.part_norms(flat).items()} == {"llm": 5.0, "fusion": 3.0}


# --- other rates ---


@pytest.mark.parametrize(
    "lr_of, expected",
    [
        ({}, {}),
        ({"fusion": 1e-4}, {"fusion/fuse/projector/fc1/kernel": 5.0}),
        (
            {"fusion": 2e-5, "llm/layers": 1e-5},
            {"fusion/fuse/projector/fc1/kernel": 1.0, "llm/layers/attention/q": 0.5},
        ),
        ({"(vision|llm)/(blocks/fc1/bias|embedding)": 4e-5}, {"vision/blocks/fc1/bias": 2.0, "llm/embedding": 2.0}),
    ],
)
def test_rates(lr_of, expected):
    """Shares of lr=2e-5, for whole names at the beginning of a path."""
    assert opt.rates(VISION | FUSION | LLM, StageConfig(lr=2e-5, lr_of=lr_of)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "lr_of, sentence",
    [
        ({"fus": 1e-4}, "lr_of='fus' matches the start of no trained parameter's path; they look like llm/embedding, llm/layers/attention/q"),
        ({"vision": 1e-4}, "lr_of='vision' matches the start of no trained parameter's path; they look like llm/embedding, llm/layers/attention/q"),
        ({"llm/emb.*": 1e-4, "llm": 1e-5}, "lr_of sets two rates for llm/embedding, the second (1e-05) by 'llm'; remove one"),
    ],
)  # fmt: skip
def test_rates_that_name_nothing_or_the_same_twice(lr_of, sentence):
    with pytest.raises(UserError) as caught:
        opt.rates(LLM, StageConfig(lr_of=lr_of))
    assert str(caught.value) == sentence


def test_a_rate_of_its_own_scales_the_update_and_its_decay():
    """And nothing else; without lr_of the optimizer's state is what it was."""
    params = {"llm/head": jnp.array([[1.0, -2.0]]), "fusion/fuse/projector/fc1/kernel": jnp.array([[3.0, 4.0]])}
    grads = {path: 0.1 * leaf for path, leaf in params.items()}
    plain = StageConfig(lr=2e-4, weight_decay=0.1)
    (one, state), (other, _) = (
        opt.adamw(stage, MATRICES).update(grads, opt.adamw(stage, MATRICES).init(params), params)
        for stage in (plain, StageConfig(lr=2e-4, weight_decay=0.1, lr_of={"fusion": 2e-5}))
    )
    np.testing.assert_array_equal(other["llm/head"], one["llm/head"])
    np.testing.assert_allclose(
        other["fusion/fuse/projector/fc1/kernel"], [[0.13, 0.14]], rtol=1e-5
    )  # 0.1 * (1 + 0.1 w)
    assert len(state) == 3
