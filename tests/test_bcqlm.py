"""`bcqlm` against a reference in float64, and images that nobody asks about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.interfaces import Question
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.training.report import count
from tiny import N, params_of, refusal, tiny_config

TQ = 5


def config_of(question=TQ, heads=8, **groups):
    return tiny_config(fusion=dict(name="bcqlm", bcqlm=dict(question=question, heads=heads)), **groups)


def drawn(images):
    """Levels of images, and questions about them of no token, one, two, ..."""
    rng = np.random.default_rng(0)
    levels = rng.standard_normal((1, images, 1, N, 24)).astype(np.float32)
    there = np.arange(TQ) < np.arange(images)[:, None] % (TQ + 1)
    return levels, Question(there, rng.standard_normal((images, TQ, 32)).astype(np.float32))


@pytest.fixture(scope="module")
def module():
    cfg = config_of()
    return Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)


@pytest.fixture(scope="module")
def params(module):
    return params_of(module, *drawn(1))


@pytest.fixture(scope="module")
def tokens_of(module):
    return jax.jit(lambda params, levels, question: module.apply({"params": params}, levels, question).tokens)


def test_equals_the_reference(params, tokens_of):
    levels, question = drawn(4)
    fused = tokens_of(params, levels, question)
    p = reference.double(params)["fuse"]
    for image in range(4):
        x = reference.linear(p["project"], levels[0, image, 0].astype(np.float64))
        words = question.words[image].astype(np.float64)[question.there[image]]
        asked, mean = np.zeros_like(x), np.zeros(32)
        if len(words):
            asked, mean = reference.biased_attention(p["attention"], x, words), words.mean(0)
        gate = np.array([np.concatenate([row, mean]) for row in x])
        gate = np.maximum(reference.linear(p["gate1"], gate), 0)
        gate = reference.sigmoid(reference.linear(p["gate2"], gate))
        assert gate.shape == (N, 1)
        y = reference.layer_norm(p["norm"], x + gate * asked, 1e-5)
        y = y + reference.linear(p["fc2"], np.maximum(reference.linear(p["fc1"], y), 0))
        np.testing.assert_allclose(fused[image], reference.layer_norm(p["norm"], y, 1e-5), rtol=1e-4, atol=1e-5)


def test_positions_without_a_token_add_nothing(params, tokens_of):
    """Whatever they hold. An image without a question says the same whatever stands in its place."""
    levels, question = drawn(4)
    noise = np.where(question.there[..., None], question.words, np.nan).astype(np.float32)
    expected = tokens_of(params, levels, question)
    np.testing.assert_array_equal(tokens_of(params, levels, question.replace(words=noise)), expected)
    changed = tokens_of(params, levels, question.replace(words=question.words + 1))
    differ = np.abs(changed - expected).max((1, 2))
    assert differ[0] == 0 and differ[1:].min() > 1e-2


def test_gradients_without_any_question(module, params):
    """Finite; those of the attention are zero, all others are not."""
    levels, question = drawn(1)
    loss = lambda params: (module.apply({"params": params}, levels, question).tokens ** 3).sum()
    slopes = jax.jit(jax.grad(loss))(params)["fuse"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    moved = {name for name, part in slopes.items() if any(np.asarray(leaf).any() for leaf in jax.tree.leaves(part))}
    assert moved == {"project", "norm", "fc1", "fc2"}


def test_parameters_of_the_original():
    """Without its matrices from a text encoder's width: 144,756,737 - 2 (768 x 4096 + 4096)."""
    cfg = config_of(77, vision=dict(width=1024, heads=16), llm=dict(width=4096))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    question = Question(jnp.ones((1, 77), bool), jnp.zeros((1, 77, 4096)))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1, 1, N, 1024)), question))
    assert count(shapes["params"]) == 138_457_089


@pytest.mark.parametrize("value", [0, 1025])
def test_a_number_of_tokens_that_cannot_be(value):
    assert refusal(config_of, value) == f"config.fusion.bcqlm.question={value}: expected 1 to 1024 tokens"


def test_heads_that_cannot_be():
    sentence = "config.fusion.bcqlm.heads=5: expected a number that divides config.llm.width=32"
    assert refusal(config_of, heads=5) == sentence
