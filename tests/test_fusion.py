"""Multi-grained fusion: one level's low- and hi-res tokens become N tokens of the LLM's width."""

import math

import jax
import numpy as np
import pytest
from PIL import Image

import reference
from sparsecut_jax.data import images
from sparsecut_jax.models import ways
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.levels import crops_to_cells
from sparsecut_jax.models.ways import view_count, wiring_of
from tiny import params_of, tiny_config

WIDTH = 10  # of the LLM


def levels_of(count, images, views, side, channels):
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, images, views, side * side, channels)).astype(np.float32)


def fusion_of(name: str, count: int = 1, **settings) -> Fusion:
    """The fusion of `count` levels into WIDTH channels."""
    density = dict(density="none") if count == 1 else dict(density="sparse", count=count - 1)
    cfg = tiny_config(fusion=dict(name=name, **settings), shortcuts=density, llm=dict(width=WIDTH))
    return Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)


def stacked(fused) -> np.ndarray:
    """[K, I, S, D]: the main feature and the sources."""
    tokens = fused.tokens.reshape(1, -1, *fused.tokens.shape[-2:])
    return tokens if fused.bank is None else np.concatenate([tokens, fused.bank.reshape(-1, *tokens.shape[1:])])


def cells_of(crops: np.ndarray, grid: tuple[int, int]) -> list:
    cells = crops_to_cells(crops, grid)
    return cells.reshape(cells.shape[0], -1).tolist()


def test_crops_to_cells():
    """Each number is one token: tens the crop (1 TL, 2 TR, 3 BL, 4 BR), ones its place in the crop.

    11 12 | 21 22
    13 14 | 23 24
    ------+------
    31 32 | 41 42
    33 34 | 43 44
    """
    crops = np.array([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [41, 42, 43, 44]])[..., None]
    expected = [[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [41, 42, 43, 44]]
    assert cells_of(crops, (2, 2)) == expected


def test_crops_to_cells_of_an_odd_side():
    """3 x 3 tokens per crop: the middle row and column of low-res tokens lie over two crops."""
    crops = np.array([[c + i for i in range(1, 10)] for c in (10, 20, 30, 40)])[..., None]
    assert cells_of(crops, (2, 2)) == [
        [11, 12, 14, 15], [13, 21, 16, 24], [22, 23, 25, 26],
        [17, 18, 31, 32], [19, 27, 33, 41], [28, 29, 42, 43],
        [34, 35, 37, 38], [36, 44, 39, 47], [45, 46, 48, 49],
    ]  # fmt: skip


def test_crops_to_cells_of_other_grids():
    """Two crops of 2 x 2 tokens, side by side and one above the other.

    11 12 | 21 22        11 12
    13 14 | 23 24        13 14
                         -----
                         21 22
                         23 24
    """
    crops = np.array([[11, 12, 13, 14], [21, 22, 23, 24]])[..., None]
    assert cells_of(crops, (1, 2)) == [[11, 12], [21, 22], [13, 14], [23, 24]]
    assert cells_of(crops, (2, 1)) == [[11, 13], [12, 14], [21, 23], [22, 24]]


def test_crops_to_cells_of_a_grid_of_2_rows_and_3_columns():
    """11 12 | 21 22 | 31 32
    13 14 | 23 24 | 33 34
    ------+-------+------
    41 42 | 51 52 | 61 62
    43 44 | 53 54 | 63 64
    """
    crops = np.array([[c + i for i in (1, 2, 3, 4)] for c in (10, 20, 30, 40, 50, 60)])[..., None]
    assert cells_of(crops, (2, 3)) == [
        [11, 12, 21, 13, 14, 23], [22, 31, 32, 24, 33, 34],
        [41, 42, 51, 43, 44, 53], [52, 61, 62, 54, 63, 64],
    ]  # fmt: skip


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (2, 1), (3, 3), (2, 3)])
def test_tokens_and_pixels_line_up(grid):
    """Every pixel is a token here and tells its place: the views of a picture, and the cells of each low-res token."""
    rows, columns = grid
    y, x = np.mgrid[: 3 * rows, : 3 * columns].astype(np.uint8)
    picture = Image.fromarray(np.stack([y, x, 0 * x], -1))
    crops = images.views(picture, 3, grid, "squash")[1:].reshape(-1, 9, 3)
    cells = crops_to_cells(crops, grid).reshape(3, 3, rows, columns, 3)
    for y, x, i, j in np.ndindex(3, 3, rows, columns):
        assert cells[y, x, i, j].tolist() == [rows * y + i, columns * x + j, 0]


def test_crops_to_cells_keeps_channels_and_leading_axes():
    crops = np.arange(2 * 3 * 4 * 4 * 5).reshape(2, 3, 4, 4, 5)
    cells = crops_to_cells(crops, (2, 2))
    assert cells.shape == (2, 3, 4, 4, 5)
    # token 2 covers the third row's first two cells: the BL crop's tokens 0 and 1, then 2 and 3
    assert cells[1, 2, 2].reshape(-1).tolist() == crops[1, 2, 2].reshape(-1).tolist()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "name, side, channels",
    [("channel", 3, 6), ("channel", 2, 6), ("cross_attention", 3, 128), ("cross_attention", 2, 6), ("mlp", 3, 6)],
)
def test_fusion_equals_the_reference(name, side, channels, shared):
    """Per level, each row of `levels` with its own slice of the weights; 128 channels are two heads."""
    levels = levels_of(3, 2, 1 if name == "mlp" else 5, side, channels)
    module = fusion_of(name, 3, shared=shared)
    params = params_of(module, levels)
    out = jax.jit(module.apply)({"params": params}, levels)
    fused = stacked(out)
    assert fused.shape == (3, 2, side * side, WIDTH)
    assert out.aux_loss == 0
    weights = reference.double(params["fuse"])
    for k in range(3):
        own = weights if shared else reference.layer_of(weights, k)
        for i in range(2):
            expected = reference.FUSIONS[name](own, levels[k, i].astype(np.float64))
            np.testing.assert_allclose(fused[k, i], expected, rtol=1e-5, atol=1e-5)


def channel(p, views, grid):
    """Views [V, N, C] -> [N, D], token by token: the reference for any grid."""
    rows, columns = grid
    h = math.isqrt(views.shape[1])
    inputs = []
    for y, x in np.ndindex(h, h):
        parts = [views[0, y * h + x]]
        for i, j in np.ndindex(rows, columns):
            cy, cx = rows * y + i, columns * x + j  # on the canvas of rows * h x columns * h tokens
            parts.append(views[1 + cy // h * columns + cx // h, cy % h * h + cx % h])
        inputs.append(np.concatenate(parts))
    return reference.project(p["projector"], np.stack(inputs))


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("name", ["channel", "cross_attention"])
def test_fusion_of_any_grid_equals_the_reference(name, grid):
    levels = levels_of(2, 2, 1 + grid[0] * grid[1], 3, 6)
    module = fusion_of(name, 2, grid=grid)
    params = params_of(module, levels)
    fused = stacked(jax.jit(module.apply)({"params": params}, levels))
    weights = reference.double(params["fuse"])
    for k, i in np.ndindex(2, 2):
        inputs = (weights, levels[k, i].astype(np.float64))
        expected = channel(*inputs, grid) if name == "channel" else reference.cross_attention(*inputs)
        np.testing.assert_allclose(fused[k, i], expected, rtol=1e-5, atol=1e-5)


def test_number_of_views():
    grids = [(2, 2), (1, 2), (2, 1), (3, 3), (8, 8)]
    count = lambda name: [ways.views(tiny_config(fusion=dict(name=name, grid=grid))) for grid in grids]
    assert count("channel") == count("cross_attention") == [5, 3, 3, 10, 65]
    assert count("mlp") == [1] * 5


@pytest.mark.parametrize(
    "name, grid, views",
    [("channel", (2, 2), 1), ("channel", (2, 2), 4), ("cross_attention", (2, 2), 1), ("mlp", (2, 2), 5), ("channel", (3, 3), 5)],
)  # fmt: skip
def test_wrong_number_of_views(name, grid, views):
    module = fusion_of(name, grid=grid)
    with pytest.raises(ValueError, match=f"fusion '{name}' reads {view_count(module.wiring)} views, got {views}"):
        module.init(jax.random.key(0), levels_of(1, 1, views, 2, 6))


def test_parameters():
    """Shared, there is one set, whatever the number of levels; else a leading axis of levels."""

    def shapes(name, shared):
        params = params_of(fusion_of(name, 3, shared=shared), levels_of(3, 1, 5, 2, 128))
        return jax.tree.map(lambda leaf: leaf.shape, params["fuse"])

    projector = {"fc1": {"kernel": (640, 10), "bias": (10,)}, "fc2": {"kernel": (10, 10), "bias": (10,)}}
    assert shapes("channel", True) == {"projector": projector}
    assert shapes("channel", False) == {
        "projector": {"fc1": {"kernel": (3, 640, 10), "bias": (3, 10)}, "fc2": {"kernel": (3, 10, 10), "bias": (3, 10)}}
    }
    qkv = {f"{n}_kernel": (128, 2, 64) for n in "qkv"} | {f"{n}_bias": (2, 64) for n in "qkv"}
    assert shapes("cross_attention", True) == {
        "attention": {**qkv, "out_kernel": (2, 64, 128), "out_bias": (128,)},
        "norm1": {"scale": (128,), "bias": (128,)},
        "norm2": {"scale": (128,), "bias": (128,)},
        "ffn1": {"kernel": (128, 512), "bias": (512,)},
        "ffn2": {"kernel": (512, 128), "bias": (128,)},
        "projector": {"fc1": {"kernel": (128, 10), "bias": (10,)}, "fc2": projector["fc2"]},
    }


def test_parameters_of_other_grids():
    """`channel` widens with the grid, the others do not know of it."""

    def shapes(name, grid):
        module = fusion_of(name, grid=grid)
        params = params_of(module, levels_of(1, 1, view_count(module.wiring), 2, 6))
        return jax.tree.map(lambda leaf: leaf.shape, params["fuse"])

    assert {grid: shapes("channel", grid)["projector"]["fc1"]["kernel"] for grid in [(2, 2), (1, 2), (2, 1), (3, 3)]} == {
        (2, 2): (30, 10), (1, 2): (18, 10), (2, 1): (18, 10), (3, 3): (60, 10)
    }  # fmt: skip
    for name in ("cross_attention", "mlp"):
        assert shapes(name, (3, 3)) == shapes(name, (2, 2))


@pytest.mark.parametrize("name", ["channel", "cross_attention"])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_is_the_same_function(name, remat):
    """Values and gradients."""
    levels = levels_of(3, 2, 5, 4, 64)
    plain, remade = (fusion_of(name, 3, remat=policy) for policy in ("none", remat))
    params = params_of(plain, levels)

    def gradients(module):
        out = lambda params, levels: module.apply({"params": params}, levels)
        total = lambda params, levels: sum((x**2).sum() for x in jax.tree.leaves(out(params, levels)))
        return jax.jit(jax.grad(total, (0, 1)))(params, levels)

    for got, expected in zip(*map(jax.tree.leaves, (gradients(remade), gradients(plain))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
