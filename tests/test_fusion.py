"""Multi-grained fusion: one level's low- and hi-res tokens become N tokens of the LLM's width."""

import jax
import numpy as np
import pytest

import reference
from sparsecut_jax.models.fusion import Fusion, crops_to_cells
from sparsecut_jax.settings import FusionConfig
from tiny import params_of

WIDTH = 10  # of the LLM


def levels_of(count, images, views, side, channels):
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, images, views, side * side, channels)).astype(np.float32)


def test_crops_to_cells():
    """Each number is one token: tens the crop (1 TL, 2 TR, 3 BL, 4 BR), ones its place in the crop.

    11 12 | 21 22
    13 14 | 23 24
    ------+------
    31 32 | 41 42
    33 34 | 43 44
    """
    crops = np.array([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [41, 42, 43, 44]])[..., None]
    assert crops_to_cells(crops).tolist() == [[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [41, 42, 43, 44]]


def test_crops_to_cells_of_an_odd_side():
    """3 x 3 tokens per crop: the middle row and column of low-res tokens lie over two crops."""
    crops = np.array([[c + i for i in range(1, 10)] for c in (10, 20, 30, 40)])[..., None]
    assert crops_to_cells(crops).tolist() == [
        [11, 12, 14, 15], [13, 21, 16, 24], [22, 23, 25, 26],
        [17, 18, 31, 32], [19, 27, 33, 41], [28, 29, 42, 43],
        [34, 35, 37, 38], [36, 44, 39, 47], [45, 46, 48, 49],
    ]  # fmt: skip


def test_crops_to_cells_keeps_channels_and_leading_axes():
    crops = np.arange(2 * 3 * 4 * 4 * 5).reshape(2, 3, 4, 4, 5)
    cells = crops_to_cells(crops)
    assert cells.shape == (2, 3, 4, 20)
    # token 2 covers the third row's first two cells: the BL crop's tokens 0 and 1, then 2 and 3
    assert cells[1, 2, 2].tolist() == crops[1, 2, 2].reshape(-1).tolist()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "name, side, channels",
    [("channel", 3, 6), ("channel", 2, 6), ("cross_attention", 3, 128), ("cross_attention", 2, 6), ("mlp", 3, 6)],
)
def test_fusion_equals_the_reference(name, side, channels, shared):
    """Per level, each row of `levels` with its own slice of the weights; 128 channels are two heads."""
    levels = levels_of(3, 2, 1 if name == "mlp" else 5, side, channels)
    module = Fusion(FusionConfig(name=name, shared=shared), WIDTH)
    params = params_of(module, levels)
    fused, aux_loss = jax.jit(module.apply)({"params": params}, levels)
    assert fused.shape == (3, 2, side * side, WIDTH)
    assert aux_loss == 0
    weights = reference.double(params["fuse"])
    for k in range(3):
        own = weights if shared else reference.layer_of(weights, k)
        for i in range(2):
            expected = reference.FUSIONS[name](own, levels[k, i].astype(np.float64))
            np.testing.assert_allclose(fused[k, i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, views", [("channel", 1), ("channel", 4), ("cross_attention", 1), ("mlp", 5)])
def test_wrong_number_of_views(name, views):
    module = Fusion(FusionConfig(name=name), WIDTH)
    reads = 1 if name == "mlp" else 5
    with pytest.raises(ValueError, match=f"fusion '{name}' reads {reads} views, got {views}"):
        module.init(jax.random.key(0), levels_of(1, 1, views, 2, 6))


def test_parameters():
    """Shared, there is one set, whatever the number of levels; else a leading axis of levels."""

    def shapes(name, shared):
        params = params_of(Fusion(FusionConfig(name=name, shared=shared), WIDTH), levels_of(3, 1, 5, 2, 128))
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
