"""Next-token cross-entropy: sums over the supervised tokens of the whole batch."""

import jax
import numpy as np

from sparsecut_jax.training.losses import cross_entropy
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
