"""Next-token cross-entropy: sums over the supervised tokens of the whole batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecut_jax.models import losses
from sparsecut_jax.models.losses import chunked_cross_entropy, cross_entropy
from sparsecut_jax.runtime import sharding
from tiny import make_batch


def batch_of(tokens, mask):
    tokens = np.array(tokens, np.int32)
    return make_batch([[0]] * len(tokens), length=tokens.shape[1]).replace(
        tokens=tokens, loss_mask=np.array(mask, np.uint8)
    )


def test_literal():
    """Probabilities 1/2, 1/4, 1/4 of three words: word 0 costs log 2, the others log 4."""
    logits = np.broadcast_to(np.log([2.0, 1.0, 1.0]), (2, 4, 3)).astype(np.float32)
    batch = batch_of([[1, 0, 1, 2], [0, 0, 0, 0]], [[0, 1, 0, 1], [0, 1, 0, 0]])
    total, count = cross_entropy(logits, batch)
    np.testing.assert_allclose(total, np.log(2) + np.log(4) + np.log(2), rtol=1e-6)
    assert count == 3
    assert total.dtype == count.dtype == np.float32


def test_a_token_is_predicted_from_the_position_before_it():
    """Only position 1 knows that position 2 holds word 4."""
    logits = np.zeros((1, 4, 6), np.float32)
    logits[0, 1, 4] = 100
    total, count = cross_entropy(logits, batch_of([[0, 0, 4, 4]], [[0, 0, 1, 0]]))
    np.testing.assert_allclose(total, 0, atol=1e-6)
    total, _ = cross_entropy(logits, batch_of([[0, 0, 4, 4]], [[0, 0, 0, 1]]))
    np.testing.assert_allclose(total, np.log(6), rtol=1e-6)


def test_the_first_position_is_predicted_by_nobody():
    logits = np.zeros((1, 3, 6), np.float32)
    total, count = cross_entropy(logits, batch_of([[1, 2, 3]], [[1, 0, 0]]))
    assert (total, count) == (0, 0)


def test_equals_a_loop():
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((3, 7, 11))).astype(np.float32)
    batch = batch_of(rng.integers(0, 11, (3, 7)), rng.integers(0, 2, (3, 7)))
    expected = 0.0
    for b in range(3):
        for t in range(1, 7):
            if batch.loss_mask[b, t]:
                row = logits[b, t - 1].astype(np.float64)
                expected += np.log(np.exp(row).sum()) - row[batch.tokens[b, t]]
    total, count = cross_entropy(logits, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == batch.loss_mask[:, 1:].sum()


def test_unsupervised_positions_may_hold_anything():
    """NaN logits, or an id outside the vocabulary (-200)."""
    logits = np.zeros((1, 4, 6), np.float32)
    logits[0, [0, 2, 3]] = np.nan
    total, count = cross_entropy(logits, batch_of([[-200, -200, 3, 99]], [[0, 0, 1, 0]]))
    np.testing.assert_allclose(total, np.log(6), rtol=1e-6)
    assert count == 1


def test_gradient():
    """softmax - one-hot where the next token is supervised, exactly 0 elsewhere."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 4, 5)).astype(np.float32)
    batch = batch_of([[0, 3, 1, 2]], [[0, 1, 0, 1]])
    grad = jax.grad(lambda x: cross_entropy(x, batch)[0])(logits)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.zeros((1, 4, 5))
    expected[0, 0] = softmax[0, 0] - np.eye(5)[3]
    expected[0, 2] = softmax[0, 2] - np.eye(5)[2]
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    assert not np.any(grad[0, [1, 3]])


def test_large_logits():
    logits = np.array([[[1e4, 0, -1e4], [0, 0, 0]]], np.float32)
    total, _ = cross_entropy(logits, batch_of([[0, 1]], [[0, 1]]))
    np.testing.assert_allclose(total, 1e4)


# --- in chunks ---


def drawn(b=4, t=10, d=6, w=11):
    rng = np.random.default_rng(1)
    hidden, words = rng.standard_normal((b, t, d)).astype(np.float32), rng.standard_normal((d, w)).astype(np.float32)
    return hidden, words, batch_of(rng.integers(0, w, (b, t)), rng.integers(0, 2, (b, t)))


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 256])
def test_chunks_equal_the_whole(chunk):
    """Sum, count and gradients; 3 does not divide 10 positions."""
    hidden, words, batch = drawn()
    whole = lambda hidden, words: cross_entropy(jnp.einsum("BTD,DW->BTW", hidden, words), batch)
    chunks = lambda hidden, words: chunked_cross_entropy(hidden, words, batch, chunk)
    (total, count), grads = jax.value_and_grad(chunks, (0, 1), has_aux=True)(hidden, words)
    (right_total, right_count), right = jax.value_and_grad(whole, (0, 1), has_aux=True)(hidden, words)
    np.testing.assert_allclose(total, right_total, rtol=1e-6)
    assert count == right_count == batch.loss_mask[:, 1:].sum()
    for got, expected in zip(grads, right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def sharded_gradients(shape, chunk, t=64, w=512):
    """Compiled gradients of 8 rows on a mesh of (data, fsdp, tensor) devices, head [16, W] split as the model's is."""
    mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    struct = lambda shape, *axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, sharding.spec(axes))
    )
    _, _, batch = drawn(8, t)
    grads = jax.grad(lambda hidden, words: chunked_cross_entropy(hidden, words, batch, chunk)[0], (0, 1))
    with jax.set_mesh(mesh):
        lowered = jax.jit(grads).lower(struct((8, t, 16), "batch"), struct((16, w), "embed", "vocab"))
        return lowered.compile()


def test_whole_logits_never_exist():
    """Of 8 rows on 8 devices, 4096 positions and 512 words, one device's logits alone would be 8 MiB."""
    whole, chunked = (sharded_gradients((1, 8, 1), chunk, t=4096) for chunk in (4096, 128))
    assert whole.memory_analysis().temp_size_in_bytes > 4096 * 512 * 4
    assert chunked.memory_analysis().temp_size_in_bytes < 4096 * 512 * 4 / 4
    assert "f32[1,1,4096,512]" in whole.as_text() and "4096,512]" not in chunked.as_text()


def loops(text):
    """The bodies of the while loops in HLO text, and all they call, as one text."""
    computations = {}
    for block in text.split("\n\n"):
        name = block.strip().removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
        computations[name] = block
    found, todo = {}, re.findall(r"body=%([\w.-]+)", text)
    while todo:
        name = todo.pop()
        if name not in found and name in computations:
            found[name] = computations[name]
            todo += re.findall(r"(?:calls|to_apply|body)=%([\w.-]+)", computations[name])
    return "\n".join(found.values())


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_the_head_is_collected_once(shape):
    """No matrix crosses devices inside the loop over chunks, neither the head nor its gradient."""
    text = sharded_gradients(shape, 16).as_text()
    matrix = f"16,{512 // shape[2]}]"
    assert "dot(" in loops(text) and matrix in loops(text)
    inside = [line for line in loops(text).splitlines() if "all-gather(" in line or "all-reduce(" in line]
    assert [line for line in inside if matrix in line] == []


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1)])
def test_no_device_holds_the_gradient_of_the_head(monkeypatch, shape):
    """Split over fsdp, it is made and summed 64 words at a time; the head itself is collected, once."""
    monkeypatch.setattr(losses, "BLOCK", 64)
    text = sharded_gradients(shape, 16).as_text()
    summed = re.findall(r"= f32\[([\d,]+)\]\S* (?:all-reduce|reduce-scatter)\(", text)
    assert "16,64" in summed and not [dims for dims in summed if "512" in dims]
    assert len(re.findall(r"= f32\[[\d,]*16,512\]\S* all-gather\(", text)) == 1


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1)])
def test_chunks_on_meshes(monkeypatch, shape):
    """Sum and gradients of one device, with 11 = 11 blocks of one word where the head is split."""
    monkeypatch.setattr(losses, "BLOCK", 4)
    hidden, words, batch = drawn(8, d=8, w=22)
    run = lambda hidden, words: chunked_cross_entropy(hidden, words, batch, 3)
    right, right_grads = jax.value_and_grad(run, (0, 1), has_aux=True)(hidden, words)
    mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    with jax.set_mesh(mesh):
        got, grads = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(hidden, words)
    np.testing.assert_allclose(got, right, rtol=1e-5)
    for one, expected in zip(grads, right_grads, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_trained_costs_nothing():
    """Of the three products of a chunk only the logits and the gradient of the hidden state are left."""
    hidden, words, batch = drawn(2, 64, 32, 512)

    def flops(arguments):
        grads = jax.grad(lambda hidden, words: chunked_cross_entropy(hidden, words, batch, 64)[0], arguments)
        return jax.jit(grads).lower(hidden, words).compile().cost_analysis()["flops"]

    product = 2 * hidden.size * 512
    assert flops((0, 1)) > 3 * product > flops(0) > 2 * product


def test_chunks_in_which_nothing_is_predicted_are_left_out():
    """Whatever stands there: an image, a question. Chunks of 4: only the second and the fourth have targets."""
    rng = np.random.default_rng(3)
    hidden, words = rng.standard_normal((2, 16, 8), np.float32), rng.standard_normal((8, 11), np.float32)
    mask = np.zeros((2, 16), np.uint8)
    mask[0, 6:8] = mask[1, 14] = 1
    batch = batch_of(rng.integers(0, 11, (2, 16)), mask)
    summed = lambda hidden, words: chunked_cross_entropy(hidden, words, batch, 4)[0]
    whole, gradients = jax.value_and_grad(lambda h, w: cross_entropy(h @ w, batch)[0], (0, 1))(hidden, words)
    spoilt = hidden.copy()
    spoilt[:, 0:4], spoilt[:, 8:12] = np.nan, np.inf
    found, (by_hidden, by_words) = jax.jit(jax.value_and_grad(summed, (0, 1)))(spoilt, words)
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    np.testing.assert_allclose(by_hidden, gradients[0], atol=1e-6)
    np.testing.assert_allclose(by_words, gradients[1], atol=1e-5)
    np.testing.assert_allclose(jax.jit(summed)(spoilt, words), whole, rtol=1e-6)


def test_right_answers_by_hand():
    """Rows of three answers; the most likely word is named at the position before it. The second answer misses a token."""
    tokens = [[0, 3, 0, 4, 5, 0, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0]]
    mask = [[0, 1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]]
    said = np.array([[3, 0, 4, 0, 0, 1, 2, 0], [0] * 8])  # 5 after 4 is missed
    hidden, words = np.eye(6, dtype=np.float32)[said], np.eye(6, dtype=np.float32)
    for chunk in (3, 8, 256):
        right, count = losses.right_answers(hidden, words, batch_of(tokens, mask), chunk)
        assert (float(right), float(count)) == (2, 3)
