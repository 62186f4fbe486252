"""The decoder: scanned layers, shortcuts before or after them, cache, remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from sparsecut_jax.models.interfaces import Sources
from sparsecut_jax.models.levels import wiring_of_shortcuts
from sparsecut_jax.models.llm import Decoder, empty_cache
from sparsecut_jax.models.shortcuts import Shortcuts
from tiny import N, random_params, tiny_config

B, M, T = 2, 2, 24
CFG = tiny_config().llm
# two sources meet in layer 3; source 0 enters twice; the first and the last layer have one
PAIRS = ((4, 0), (4, 3), (1, 3), (0, 6))
SHORTCUTS = Shortcuts(PAIRS, main_level=3, vit_depth=5, llm_depth=7)
WIRING = wiring_of_shortcuts(SHORTCUTS, N)
SOURCES = ((0, 0), (0, 3), (1, 3), (2, 6))  # the same as (row of the bank, layer)
START = np.array([[2, 15], [5, -1]], np.int32)


def wired(**changes):
    return wiring_of_shortcuts(dataclasses.replace(SHORTCUTS, **changes), N)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return dict(
        x=rng.standard_normal((B, T, 32)).astype(np.float32),
        positions=np.stack([np.arange(T), np.arange(T) + 5]).astype(np.int32),
        sight=np.tril(np.ones((B, T, T), bool)),
        sources=Sources(rng.standard_normal((3, B, M, N, 32)).astype(np.float32), START),
    )


def logits_of(decoder, x, *args, **kwargs):
    hidden, cache, seen = decoder(x, *args, **kwargs)
    return decoder.logits(hidden), cache, seen


def params_for(cfg, wiring, inputs):
    decoder = Decoder(cfg, wiring)
    shapes = jax.eval_shape(lambda inputs: decoder.init(jax.random.key(0), **inputs, method=logits_of), inputs)
    return random_params(shapes["params"])


@pytest.fixture(scope="module")
def params(inputs):
    return params_for(CFG, WIRING, inputs)


def run(cfg, wiring, params, inputs, intermediates=()):
    decoder = Decoder(cfg, wiring, intermediates)
    logits, _, seen = jax.jit(lambda p, i: decoder.apply({"params": p}, **i, method=logits_of))(params, inputs)
    return logits, seen


def expected(cfg, params, inputs, position="pre"):
    shortcuts = [(layer, inputs["sources"].bank[row]) for row, layer in SOURCES]
    return reference.decoder(params, inputs["x"], inputs["positions"], inputs["sight"], cfg, shortcuts, START, position)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_decoder_equals_the_reference(params, inputs, position):
    logits, seen = run(CFG, wired(position=position), params, inputs, ("hidden", "shortcut_ratio"))
    right, layer_inputs = expected(CFG, params, inputs, position)
    np.testing.assert_allclose(logits, right, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(seen["hidden"], layer_inputs, rtol=1e-5, atol=5e-5)
    # where something entered: layers by sources
    assert (np.asarray(seen["shortcut_ratio"]) > 0).astype(int).tolist() == [
        [1, 0], [0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [1, 0],
    ]  # fmt: skip


def test_before_and_after_a_layer_differ(params, inputs):
    """The reference tells them apart by far more than the tolerance."""
    pre, post = (expected(CFG, params, inputs, position)[0] for position in ("pre", "post"))
    assert np.abs(pre - post).max() > 0.1


def test_decoder_without_shortcuts(params, inputs):
    """No bank, no slots: the same parameters, the plain decoder."""
    plain = {name: inputs[name] for name in ("x", "positions", "sight")}
    logits, seen = run(CFG, wired(pairs=()), params, plain, ("hidden", "shortcut_ratio"))
    right, _ = reference.decoder(params, inputs["x"], inputs["positions"], inputs["sight"], CFG)
    np.testing.assert_allclose(logits, right, rtol=1e-5, atol=5e-5)
    assert set(seen) == {"hidden"}


def test_tied_embeddings(inputs):
    """The head is the embedding's transpose and no parameter."""
    cfg = dataclasses.replace(CFG, layers=2, tie_embeddings=True)
    wiring = wired(pairs=((4, 0), (1, 1)), llm_depth=2)
    params = params_for(cfg, wiring, inputs)
    assert set(params) == {"embedding", "layers", "norm"}
    logits, _ = run(cfg, wiring, params, inputs)
    shortcuts = [(0, inputs["sources"].bank[0]), (1, inputs["sources"].bank[1])]
    right, _ = reference.decoder(params, inputs["x"], inputs["positions"], inputs["sight"], cfg, shortcuts, START)
    np.testing.assert_allclose(logits, right, rtol=1e-5, atol=5e-5)


SMALL = dataclasses.replace(CFG, layers=3)
SMALL_WIRING = wired(pairs=((4, 0), (4, 2), (1, 2)), llm_depth=3)


@pytest.fixture(scope="module")
def gradients(inputs):
    """Function of a config -> (loss, gradients of the parameters and of the bank)."""
    params = params_for(SMALL, SMALL_WIRING, inputs)
    target = np.random.default_rng(1).standard_normal((B, T, 64)).astype(np.float32)

    def loss(params, bank, cfg):
        decoder = Decoder(cfg, SMALL_WIRING)
        logits, _, _ = decoder.apply(
            {"params": params}, **{**inputs, "sources": Sources(bank, START)}, method=logits_of
        )
        return (logits * target).mean()

    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    return lambda cfg: run(params, inputs["sources"].bank, cfg)


@pytest.fixture(scope="module")
def plain_gradients(gradients):
    return gradients(SMALL)


@pytest.mark.parametrize("changes", [dict(scan_layers=False), dict(remat="dots"), dict(remat="full")])
def test_unrolled_and_remat_are_the_same_function(gradients, plain_gradients, changes):
    got = gradients(dataclasses.replace(SMALL, **changes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, plain_gradients)


def test_every_used_source_and_every_layer_has_a_gradient(plain_gradients):
    _, (params, bank) = plain_gradients
    for path, grad in jax.tree_util.tree_leaves_with_path(params["layers"]):
        assert all(np.abs(layer).max() > 0 for layer in grad), path
    used = np.zeros((3, B, M), bool)
    used[:2] = START >= 0  # two rows of the bank enter somewhere
    np.testing.assert_array_equal(np.abs(bank).max((-1, -2)) > 0, used)


def test_cache_in_pieces_equals_one_pass(params, inputs):
    """The first 17 positions with the shortcuts of the first slot, then 4, then one by one, without any."""
    start = np.array([[2, -1], [5, -1]], np.int32)
    whole, _ = run(CFG, WIRING, params, {**inputs, "sources": inputs["sources"].replace(image_start=start)})
    decoder = Decoder(CFG, WIRING)

    @jax.jit
    def step(params, x, positions, mask, cache, bank=None):
        slots = {} if bank is None else dict(sources=Sources(bank, start))
        logits, cache, _ = decoder.apply({"params": params}, x, positions, mask, cache=cache, method=logits_of, **slots)
        return logits, cache

    cache = empty_cache(CFG, B, T + 3, jnp.float32)  # longer than needed
    assert cache.k.shape == cache.v.shape == (7, B, 2, T + 3, 8)
    mask = np.pad(inputs["sight"], ((0, 0), (0, 0), (0, 3)))
    pieces = []
    for begin, end in [(0, 17), (17, 21), (21, 22), (22, 23), (23, 24)]:
        at = slice(begin, end)
        logits, cache = step(
            params,
            inputs["x"][:, at],
            inputs["positions"][:, at],
            mask[:, at],
            cache,
            inputs["sources"].bank if begin == 0 else None,
        )
        assert cache.length == end
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=1e-5, atol=2e-5)
