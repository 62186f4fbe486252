"""Resizes weights: position embeddings to another image size, embeddings to a larger vocabulary."""

from __future__ import annotations

import numpy as np


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """float64[new, old], one row per new sample: PyTorch's "bicubic" interpolation (align_corners=False, no antialias).

    Cubic convolution with a = -0.75 (Keys 1981); samples beyond the border repeat the edge.
    """
    a = -0.75

    def weight(d: np.ndarray) -> np.ndarray:
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((d - 5) * d + 8) * d * a - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), weight(np.abs(at - (first + tap))))
    return matrix


def resize_positions(table: np.ndarray, side: int, class_token: bool) -> np.ndarray:
    """Position embeddings for side x side tokens: [P, C] -> [P', C] in the same dtype; the class token's stays first."""
    front, grid = table[: int(class_token)], table[int(class_token) :]
    old = round(len(grid) ** 0.5)
    matrix = bicubic_matrix(old, side)
    grid = grid.astype(np.float64).reshape(old, old, -1)
    grid = np.einsum("yj,xi,jic->yxc", matrix, matrix, grid, optimize=True).reshape(side * side, -1)
    return np.concatenate([front, grid.astype(table.dtype)])


def grow_rows(table: np.ndarray, rows: int) -> np.ndarray:
    """[V, D] -> [rows, D] in the same dtype: each new row is the mean of the old ones."""
    mean = table.mean(0, dtype=np.float64).astype(table.dtype)
    return np.concatenate([table, np.broadcast_to(mean, (rows - len(table), table.shape[1]))])
