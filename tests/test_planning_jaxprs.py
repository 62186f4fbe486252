"""The matmuls that are read from a jaxpr, by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from sparsecut_jax.planning.jaxprs import results, traced

W = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
ONE = 2 * 4 * 8 * 8  # FLOPs of x @ w


def kernel(x, w, y):
    y[...] = x[...] @ w[...]


def in_a_kernel(x, w):
    spec = pl.BlockSpec((2, 8), lambda i: (i, 0))
    whole = pl.BlockSpec((8, 8), lambda i: (0, 0))
    return pl.pallas_call(kernel, jax.ShapeDtypeStruct((4, 8), jnp.float32), grid=2, in_specs=[spec, whole], out_specs=spec)(x, w)  # fmt: skip


FUNCTIONS = {  # {what: (function of an input and a weight, its matmuls)}
    "one": (lambda x, w: x @ w, 1),
    "a jitted one": (lambda x, w: jax.jit(jnp.matmul)(x, w), 1),
    "one that nobody needs": (lambda x, w: (x @ w, x)[1], 0),
    "a loop of three": (lambda x, w: jax.lax.fori_loop(0, 3, lambda i, x: x @ w, x), 3),
    "a loop of unknown length": (lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x), 1),
    "the larger branch": (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x), 2),
    "with its own derivative": (lambda x, w: jax.nn.relu(x @ w), 1),
    "a kernel": (in_a_kernel, 1),
    "a matmul for each expert": (lambda x, w: jax.lax.ragged_dot(x, w[None], jnp.array([4])), 1),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_matmuls_of_a_function(what):
    function, count = FUNCTIONS[what]
    found = traced(lambda moving, frozen, x: function(x, moving["w"]), W, {}, X)
    assert sum(p.flops for p in found) == count * ONE


def test_what_the_backward_pass_adds():
    """One for each operand that depends on what is trained; the first turn's input does not, that of the others does."""
    backward = lambda function, moving, frozen: [(p.flops / ONE, p.more) for p in traced(function, moving, frozen, X)]
    turns = lambda weights, x: jax.lax.fori_loop(0, 3, lambda i, x: x @ weights["w"], x)
    assert backward(lambda moving, frozen, x: turns(moving, x), W, {}) == [(1, 1), (2, 2)]
    assert backward(lambda moving, frozen, x: turns(frozen, x), {}, W) == [(3, 0)]
    stopped = lambda moving, frozen, x: jax.lax.stop_gradient(x * moving["w"][0]) @ moving["w"]
    assert backward(stopped, W, {}) == [(1, 1)]


def test_what_a_matmul_reads_and_writes():
    """A weight made of two counts as a weight; of a product of activations the largest of three stays on the chip."""
    weights = {"a": jax.ShapeDtypeStruct((8, 2), jnp.float32), "b": jax.ShapeDtypeStruct((2, 8), jnp.float32)}
    made, used, scores = traced(lambda moving, frozen, x: (x @ (moving["a"] @ moving["b"])) @ x.T, weights, {}, X)
    assert (made.path, made.weights, made.contracted) == ("a", 32, (-1,))
    assert (used.path, used.weights, used.moved, used.outputs, used.contracted) == ("a", 64, 64, 32, ())
    assert (scores.path, scores.weights, scores.moved, scores.outputs) == ("", 0, 48, 16)


def test_what_a_result_grows_with():
    """The inputs, and constants as long as these or twice as long; not weights and other constants."""
    function = lambda moving, frozen, x: (x @ moving["w"], jnp.ones((3, 8)), moving["w"].T + 1, jnp.ones((3, 5)))
    assert [grows for _, grows in results(function, W, {}, X)] == [True, True, False, False]
