"""Interpolated position embeddings and longer vocabularies. test_parity.py compares whole towers with PyTorch's."""

import numpy as np

from sparsecut_jax.weights.resize import bicubic_matrix, grow_rows, resize_positions


def test_the_matrix_of_a_halved_row():
    """a = -0.75: 0.59375 at distance 1/2, -0.09375 at 3/2; the border is repeated, nothing is smoothed."""
    np.testing.assert_allclose(
        bicubic_matrix(4, 2), [[0.5, 0.59375, -0.09375, 0], [0, -0.09375, 0.59375, 0.5]], atol=1e-12
    )


def test_the_matrix_of_a_doubled_row():
    """Samples at 1/4 and 3/4 between the old ones."""
    near, beside, far, edge = 0.87890625, 0.26171875, -0.03515625, -0.10546875
    np.testing.assert_allclose(
        bicubic_matrix(3, 6)[2:4], [[far + beside, near, edge], [edge, near, beside + far]], atol=1e-12
    )


def test_the_same_size_changes_nothing():
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5))


def test_every_row_sums_to_one():
    np.testing.assert_allclose(bicubic_matrix(37, 16).sum(1), 1, atol=1e-12)


def test_positions_keep_rows_columns_and_the_class_token():
    """A table that grows along x in channel 0 and along y in channel 1 does so afterwards."""
    y, x = np.mgrid[:4, :4].astype(np.float32)
    table = np.concatenate([[[50, 60]], np.stack([x, y], -1).reshape(16, 2)]).astype(np.float32)
    found = resize_positions(table, 2, class_token=True)
    assert found.shape == (5, 2) and found.dtype == np.float32
    low, high = 0.59375 - 2 * 0.09375, -0.09375 + 2 * 0.59375 + 3 * 0.5
    expected = [[50, 60], [low, low], [high, low], [low, high], [high, high]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_new_rows_are_the_mean_of_the_old():
    table = np.array([[1, 10], [3, 30]], np.float32)
    np.testing.assert_array_equal(grow_rows(table, 4), [[1, 10], [3, 30], [2, 20], [2, 20]])
