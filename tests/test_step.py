"""The training step: what moves, what is left out, and that micro-batches change nothing."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsecut_jax.models.losses import cross_entropy
from sparsecut_jax.models.parameters import split
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training.step import make_gradients, make_train_step
from sparsecut_jax.types import TrainState
from tiny import IMAGE, make_batch, matrices_of, params_of, tiny_config

TRAINABLE = ("fusion/.*", "llm/layers/.*")
STAGE = StageConfig(trainable=TRAINABLE, lr=1e-2, warmup=0.0, weight_decay=0.0, clip_norm=1.0)
CFG = tiny_config(
    vision=dict(layers=2), llm=dict(layers=2), shortcuts=dict(density="explicit", vit_levels=(1,), llm_layers=(1,))
)
ROWS = [[1, 5, IMAGE, 7, 8, 9], [1, 20, 21, 22], [1, IMAGE, 11, IMAGE, 13, 14], [1, IMAGE, 31, 32, 33, 34, 35, 36]]
ANSWERS = [2, 1, 2, 5]

init_moments = jax.jit(opt.adamw(STAGE, {}).init)


def float_batch(rows=ROWS, answers=ANSWERS):
    """Views as floats, so that a test can put a NaN there."""
    batch = make_batch(rows, length=26, answers=answers)
    return batch.replace(views=(batch.views / 127.5 - 1).astype(np.float32))


@pytest.fixture(scope="module")
def model():
    return build_model(CFG, intermediates=("shortcut_ratio",))


@pytest.fixture(scope="module")
def params(model):
    return params_of(model, float_batch())


@pytest.fixture(scope="module")
def train_step(model):
    """The step of a stage that began at step 10 of the run, 8 steps long; donated, compiled once for all tests."""
    tx, rate = opt.adamw(STAGE, matrices_of(model)), opt.schedule(STAGE, 8)
    step = make_train_step(model, matrices_of(model), STAGE, tx, rate, first_step=10, seed=0, loss_chunk=16)
    return jax.jit(step, donate_argnums=0)


def new_state(params, step=10):
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    moving, _ = split(params, TRAINABLE)
    # a buffer each: a donated one cannot be there twice
    return TrainState(
        jnp.array(step, jnp.int32),
        params,
        init_moments(moving),
        jnp.array(0, jnp.int32),
        jnp.array(0, jnp.int32),
    )


def as_numpy(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def flat(params):
    return split(params, (".*",))[0]


def is_trainable(path):
    return path.startswith(("fusion/", "llm/layers/"))


# --- gradients ---


@pytest.fixture(scope="module")
def gradients(model, params):
    """Function of `accumulate` -> what the gradient function gives for rows with 2, 1, 2, 5 supervised tokens."""
    moving, frozen = split(params, TRAINABLE)
    of = lambda n: jax.jit(make_gradients(model, matrices_of(model), n, loss_chunk=16))
    run = lambda n: of(n)(moving, frozen, float_batch(), jax.random.key(0))
    made = {n: as_numpy(run(n)) for n in (1, 4)}
    return made.__getitem__


def test_accumulating_equals_the_whole_batch(gradients):
    total, count, grads, _ = gradients(1)
    total4, count4, grads4, _ = gradients(4)
    assert count == count4 == 10
    np.testing.assert_allclose(total4, total, rtol=1e-6)
    assert set(grads4) == set(grads)
    for path, grad in grads.items():
        np.testing.assert_allclose(grads4[path] / 10, grad / 10, rtol=0, atol=2e-6, err_msg=path)


def test_gradients_are_of_the_sum_over_supervised_tokens(model, params, gradients):
    """Against the plain definition."""

    def loss(moving, params):
        return cross_entropy(model.apply({"params": params | moving}, float_batch())[0], float_batch())[0]

    moving = {part: params[part] for part in ("fusion", "llm")}
    total, grads = jax.jit(jax.value_and_grad(loss))(moving, params)
    np.testing.assert_allclose(gradients(1)[0], total, rtol=1e-6)
    for path, grad in flat(grads).items():
        if is_trainable(path):
            np.testing.assert_allclose(gradients(1)[2][path], grad, rtol=1e-5, atol=1e-5, err_msg=path)
            assert np.abs(grad).max() > 0, path


def test_only_the_trainable_subtree_is_differentiated(gradients, params):
    assert set(gradients(1)[2]) == {path for path in flat(params) if is_trainable(path)}


def test_accumulated_shortcut_ratios_are_means(model, params, gradients):
    """Micro-batch i of 4 is row i; a text-only row counts with 0."""
    one = jax.jit(lambda params, batch: model.apply({"params": params}, batch)[1]["shortcut_ratio"])
    rows = [one(params, jax.tree.map(operator.itemgetter(slice(i, i + 1)), float_batch())) for i in range(4)]
    np.testing.assert_allclose(gradients(4)[3], np.mean(rows, axis=0), rtol=1e-5)
    assert not np.any(rows[1])


# --- one step ---


def test_only_trainable_parameters_move(train_step, params):
    state = new_state(params)
    before = as_numpy(state)
    after, metrics = train_step(state, float_batch())
    for path, leaf in flat(after.params).items():
        assert np.array_equal(leaf, flat(before.params)[path]) != is_trainable(path), path
    moments = optax.tree.get(after.opt_state, "mu")
    assert set(moments) == {path for path in flat(params) if is_trainable(path)}
    assert (after.step, after.skipped, after.streak) == (11, 0, 0)


def test_the_update(train_step, params, gradients):
    """AdamW on the mean gradient, times minus the learning rate."""
    total, count, grads, ratio = gradients(1)
    after, metrics = train_step(new_state(params, step=12), float_batch())
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-6)
    np.testing.assert_allclose(metrics["lr"], 1e-2 * (1 + np.cos(np.pi * 2 / 8)) / 2, rtol=1e-6)  # step 2 of 8
    norm = np.sqrt(sum(np.square(g / count, dtype=np.float64).sum() for g in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    parts = metrics["grad_norm_by_part"]
    assert set(parts) == {"fusion", "llm"}
    np.testing.assert_allclose(np.hypot(parts["fusion"], parts["llm"]), norm, rtol=1e-5)
    after = as_numpy(after)
    moments = optax.tree.get(after.opt_state, "mu")
    for path, grad in grads.items():
        clipped = grad / count * min(1, 1 / norm)
        np.testing.assert_allclose(moments[path], 0.1 * clipped, rtol=1e-3, atol=1e-7, err_msg=path)
        moved = flat(after.params)[path] - flat(params)[path]
        clear = np.abs(clipped) > 1e-4  # below, Adam's first step hangs on rounding
        np.testing.assert_allclose(moved[clear], -metrics["lr"] * np.sign(clipped)[clear], rtol=1e-2, err_msg=path)
    assert metrics["supervised_tokens"] == 10
    assert metrics["tokens"] == (5 + 9) + 4 + (4 + 18) + (7 + 9)
    np.testing.assert_allclose(metrics["shortcut_ratio"], ratio, rtol=1e-5)
    assert metrics["shortcut_ratio"].shape == (2, 1)


def test_loss_falls(train_step, params):
    state, losses = new_state(params), []
    for _ in range(6):
        state, metrics = train_step(state, float_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert state.step == 16


# --- updates that are left out ---


def spoiled(kind, batch):
    if kind == "nan views":
        views = batch.views.copy()
        views[3, 0, 0, 0, 0, 0] = np.nan
        return batch.replace(views=views)
    if kind == "infinite views":
        return batch.replace(views=np.full_like(batch.views, np.inf))
    return batch.replace(loss_mask=np.zeros_like(batch.loss_mask))


@pytest.mark.parametrize("kind", ["nan views", "infinite views", "no supervised token"])
def test_a_bad_update_is_left_out(train_step, params, kind):
    """Parameters and Adam's moments and count stay, bit by bit; step and schedule go on; then training does."""
    state, _ = train_step(new_state(params), float_batch())  # so that the moments are not zero
    before = as_numpy(state)
    for bad in (1, 2):
        state, metrics = train_step(state, spoiled(kind, float_batch()))
        equal(as_numpy(state.params), before.params)
        equal(as_numpy(state.opt_state), before.opt_state)
        assert (state.step, state.skipped, state.streak) == (11 + bad, bad, bad)
        assert (metrics["skipped"], metrics["streak"]) == (bad, bad)
        assert (metrics["supervised_tokens"] == 0) == (kind == "no supervised token")
    np.testing.assert_allclose(metrics["lr"], 1e-2 * (1 + np.cos(np.pi * 2 / 8)) / 2, rtol=1e-6)
    state, metrics = train_step(state, float_batch())
    assert np.isfinite(metrics["loss"])
    assert (state.step, state.skipped, state.streak) == (14, 2, 0)
    assert not np.array_equal(
        state.params["fusion"]["fuse"]["projector"]["fc1"]["kernel"],
        before.params["fusion"]["fuse"]["projector"]["fc1"]["kernel"],
    )


def test_a_nan_among_the_parameters(train_step, params):
    spoilt = jax.tree.map(np.copy, params)
    spoilt["llm"]["norm"]["scale"][0] = np.nan  # frozen
    state = new_state(spoilt)
    before = as_numpy(state)
    state, metrics = train_step(state, float_batch())
    assert np.isnan(metrics["loss"])
    equal(as_numpy(state.params), before.params)
    equal(as_numpy(state.opt_state), before.opt_state)
    assert (state.skipped, state.streak) == (1, 1)


# --- compilation ---


def test_compiled_once_for_every_kind_of_batch(train_step, params):
    """Text only, one image a row, M images a row: shapes are the same, and so is the program."""
    state, _ = train_step(new_state(params), float_batch())
    size = train_step._cache_size()
    assert size == 1
    for rows in ([[1, 2, 3, 4]] * 4, [[1, IMAGE, 3, 4]] * 4, [[1, IMAGE, 3, IMAGE, 4, 5]] * 4):
        state, metrics = train_step(state, float_batch(rows, 2))
        assert np.isfinite(metrics["loss"])
    assert train_step._cache_size() == 1
    assert state.skipped == 0


def test_the_state_is_donated(train_step, params):
    state = new_state(params)
    train_step(state, float_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(split(state.params, TRAINABLE)[0]))
