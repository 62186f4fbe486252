"""From an image to its views. Reading files: test_image_files.py, test_image_refusals.py, test_image_names.py."""

import functools

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from sparsecut_jax.data.images import LONGEST_SIDE, augment, border_colour, enlarged, square, views
from sparsecut_jax.settings import VisionConfig

NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
BORDER = (122, 116, 104)
FITS = ["pad", "squash", "crop"]
GRIDS = [(2, 2), (1, 2), (2, 1), (3, 3), (2, 3)]


def image(*rows) -> Image.Image:
    """Grey picture from rows of brightness."""
    return Image.fromarray(np.repeat(np.array(rows, np.uint8)[..., None], 3, 2))


def grey(pixels) -> list:
    """Rows of brightness; asserts that there is no colour."""
    pixels = np.asarray(pixels)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def coordinates(height: int, width: int) -> Image.Image:
    """Every pixel tells its own place in red and green."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([y, x, 0 * x], -1))


# ----------------------------------------------------------------------------------------------------------------------
# square


WIDE = image([10, 20, 30, 40], [50, 60, 70, 80])
TALL = image([10, 50], [20, 60], [30, 70], [40, 80])


def test_the_border_has_the_mean_colour():
    """LLaVA rounds down: 0.48145466 * 255 = 122.77."""
    assert border_colour(VisionConfig().mean) == BORDER == tuple(int(x * 255) for x in CLIPImageProcessorPil.image_mean)
    assert border_colour((0.5, 0.5, 0.5)) == (127, 127, 127)


def test_pad_adds_a_border_above_and_below():
    padded = np.asarray(square(WIDE, 4, 4, "pad", BORDER))
    assert (padded[[0, 3]] == BORDER).all()
    assert grey(padded[1:3]) == [[10, 20, 30, 40], [50, 60, 70, 80]]


def test_pad_adds_a_border_left_and_right():
    padded = np.asarray(square(TALL, 4, 4, "pad", BORDER))
    assert (padded[:, [0, 3]] == BORDER).all()
    assert grey(padded[:, 1:3]) == [[10, 50], [20, 60], [30, 70], [40, 80]]


def test_pad_puts_the_odd_row_below():
    padded = np.asarray(square(image([1, 2, 3], [4, 5, 6]), 3, 3, "pad", BORDER))
    assert grey(padded[:2]) == [[1, 2, 3], [4, 5, 6]]
    assert padded[2].tolist() == [list(BORDER)] * 3


def test_crop_takes_the_middle():
    assert grey(square(WIDE, 2, 2, "crop")) == [[20, 30], [60, 70]]
    assert grey(square(TALL, 2, 2, "crop")) == [[20, 60], [30, 70]]
    assert grey(square(image([1, 2, 3], [4, 5, 6]), 2, 2, "crop")) == [[1, 2], [4, 5]]


def test_squash_keeps_every_part():
    stripes = image(*[[0] * 8 + [100] * 8 + [200] * 8] * 3)
    np.testing.assert_allclose(grey(square(stripes, 3, 3, "squash")), [[0, 100, 200]] * 3, atol=8)


@pytest.mark.parametrize("fit", FITS)
def test_a_square_image_is_only_resized(fit):
    picture = Image.fromarray(NOISE[:30])
    assert (np.asarray(square(picture, 30, 30, fit)) == NOISE[:30]).all()
    for size in [(12, 12), (12, 24), (50, 50)]:
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        assert (np.asarray(square(picture, *size, fit)) == np.asarray(resized)).all()


# ----------------------------------------------------------------------------------------------------------------------
# square, beside CLIP's image processor


def expand2square(picture: Image.Image) -> Image.Image:
    """What LLaVA-1.5 does before the processor: the image on a canvas in the mean colour."""
    w, h = picture.size
    canvas = Image.new("RGB", (max(w, h), max(w, h)), BORDER)
    canvas.paste(picture, (0, (w - h) // 2) if w > h else ((h - w) // 2, 0))
    return canvas


def processed(picture: Image.Image, width: int, height: int, fit: str) -> np.ndarray:
    """[height, width, 3] in 0..255, by transformers.

    Where width and height differ, each of them is what the processor makes of a square of that size.
    """
    size = {"shortest_edge": width}
    if width != height:
        short = min(picture.size)
        size = {"height": height * picture.height // short, "width": width * picture.width // short}
    if fit == "squash" or fit == "pad" and width != height:
        size = {"height": height, "width": width}
    process = CLIPImageProcessorPil(
        size=size,
        crop_size={"height": height, "width": width},
        do_center_crop=fit != "squash",
        do_rescale=False,
        do_normalize=False,
    )
    picture = expand2square(picture) if fit == "pad" else picture
    return process(picture).pixel_values[0].transpose(1, 2, 0).astype(int)


def noise(width: int, height: int, low: int = 0, high: int = 256) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(low, high, (height, width, 3), np.uint8))


SIZES = [
    (64, 48), (48, 64), (61, 43), (43, 61), (48, 47), (47, 48), (97, 200), (200, 97), (151, 149), (300, 31),  # landscape and portrait
    (1, 1), (1, 90), (90, 1), (2, 91), (91, 3), (1, 2), (2, 1), (5, 7), (16, 11), (7, 250),  # thin ones, and small ones made larger
]  # fmt: skip


@pytest.mark.parametrize("size", [24, 48, 72, 33])
@pytest.mark.parametrize("fit", FITS)
def test_it_equals_the_processor(fit, size):
    """On noise, where a pixel's shift or another order of computing would show."""
    for shape in SIZES:
        found = np.asarray(square(noise(*shape), size, size, fit, BORDER)).astype(int)
        np.testing.assert_allclose(found, processed(noise(*shape), size, size, fit), atol=1, err_msg=str(shape))


@pytest.mark.parametrize("size", [(24, 48), (48, 24), (72, 24)])
@pytest.mark.parametrize("fit", FITS)
def test_it_equals_the_processor_where_rows_and_columns_differ(fit, size):
    """Without extremes: where bicubic overshoots, it matters whether rows or columns are computed first, and Pillow
    chooses by the sizes."""
    for shape in SIZES:
        found = np.asarray(square(noise(*shape, 70, 186), *size, fit, BORDER)).astype(int)
        np.testing.assert_allclose(found, processed(noise(*shape, 70, 186), *size, fit), atol=1, err_msg=str(shape))


def test_what_people_use():
    """A photo's size, at CLIP's 336 pixels and twice that."""
    picture = noise(64, 48).resize((640, 480), Image.Resampling.BICUBIC)
    for fit in FITS:
        for size in (336, 672):
            found = np.asarray(square(picture, size, size, fit, BORDER)).astype(int)
            np.testing.assert_allclose(found, processed(picture, size, size, fit), atol=1)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(LONGEST_SIDE, 1), (1, LONGEST_SIDE), (LONGEST_SIDE, 3)])
def test_a_very_long_image_takes_no_huge_canvas(fit, shape):
    """Its square has 4 billion pixels."""
    found = np.asarray(square(Image.new("RGB", shape, (200, 200, 200)), 32, 32, fit, BORDER))
    assert found.shape == (32, 32, 3)
    assert (found == (BORDER if fit == "pad" else 200)).mean() > 0.9


# ----------------------------------------------------------------------------------------------------------------------
# views


def test_crops_are_the_quarters_of_the_canvas():
    picture = coordinates(8, 8)
    canvas = np.asarray(picture)
    found = views(picture, 4, (2, 2), "pad")
    assert found.shape == (5, 4, 4, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[1], canvas[:4, :4])
    np.testing.assert_array_equal(found[2], canvas[:4, 4:])
    np.testing.assert_array_equal(found[3], canvas[4:, :4])
    np.testing.assert_array_equal(found[4], canvas[4:, 4:])


def test_crops_of_a_grid_of_three():
    picture = coordinates(12, 12)
    canvas = np.asarray(picture)
    found = views(picture, 4, (3, 3), "squash")
    assert found.shape == (10, 4, 4, 3)
    for i in range(9):
        top, left = 4 * (i // 3), 4 * (i % 3)
        np.testing.assert_array_equal(found[1 + i], canvas[top : top + 4, left : left + 4])


def test_crops_side_by_side_and_one_above_the_other():
    wide, tall = coordinates(4, 8), coordinates(8, 4)
    np.testing.assert_array_equal(np.hstack(list(views(wide, 4, (1, 2), "squash")[1:])), np.asarray(wide))
    np.testing.assert_array_equal(np.vstack(list(views(tall, 4, (2, 1), "squash")[1:])), np.asarray(tall))


def test_view_0_is_the_image_at_low_resolution():
    picture = Image.fromarray(NOISE[:16, :16])
    np.testing.assert_array_equal(views(picture, 16, (2, 2), "pad")[0], NOISE[:16, :16])
    np.testing.assert_array_equal(views(picture, 16, None, "pad"), NOISE[None, :16, :16])


def canvas_of(crops: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows, columns = grid
    return np.vstack([np.hstack(list(crops[y * columns : (y + 1) * columns])) for y in range(rows)])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
@pytest.mark.parametrize("grid", GRIDS)
def test_both_resolutions_line_up(fit, shape, grid):
    """Every low-res pixel has the colour of the hi-res pixels at its place."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack([y * 3, x * 3, 255 - y - x], -1).astype(np.uint8)
    found = views(Image.fromarray(smooth), 16, grid, fit, BORDER).astype(float)
    canvas = canvas_of(found[1:], grid)
    mean = canvas.reshape(16, grid[0], 16, grid[1], 3).mean((1, 3))
    middle = (slice(6, 10), slice(1, 15)) if shape[0] < shape[1] else (slice(1, 15), slice(6, 10))
    assert np.ptp(found[0][middle], (0, 1)).max() > 50
    np.testing.assert_allclose(mean[middle], found[0][middle], atol=4)


# ----------------------------------------------------------------------------------------------------------------------
# augment


def moved(picture: np.ndarray, dy: int, dx: int, mirror: bool) -> np.ndarray:
    """`picture` moved down by dy and right by dx, its border repeated, then mirrored."""
    (height, width), reach = picture.shape[:2], max(abs(dy), abs(dx))
    wide = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), "edge")
    cut = wide[reach - dy : reach - dy + height, reach - dx : reach - dx + width]
    return cut[:, ::-1] if mirror else cut


squashed = functools.partial(views, Image.fromarray(NOISE), 8, fit="squash")


def test_views_are_enlarged_one_by_one():
    """A view of one colour stays so: nothing of its neighbours leaks in."""
    small = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 200, 90)])
    large = enlarged(small, 7)
    assert (large.shape, large.dtype) == ((3, 7, 7, 3), np.uint8)
    assert [set(view.ravel().tolist()) for view in large] == [{10}, {200}, {90}]
    assert enlarged(small, 4) is small


def test_augment_does_nothing_when_told_so():
    found = squashed((2, 2))
    np.testing.assert_array_equal(augment(found, np.random.default_rng(0), False, 0, (2, 2)), found)


@pytest.mark.parametrize("grid", [None, *GRIDS])
def test_augment_moves_both_resolutions_together(grid):
    found = squashed(grid)
    before = found.copy()
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(150):
        result = augment(found, rng, True, 1, grid or (2, 2))
        assert result.shape == found.shape and result.dtype == np.uint8
        matches = [
            (dy, dx, mirror)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            for mirror in (False, True)
            if np.array_equal(result[0], moved(found[0], dy, dx, mirror))
        ]
        assert len(matches) == 1
        seen.add(matches[0])
        if grid:
            dy, dx, mirror = matches[0]
            expected = moved(canvas_of(found[1:], grid), grid[0] * dy, grid[1] * dx, mirror)
            np.testing.assert_array_equal(canvas_of(result[1:], grid), expected)
    assert len(seen) == 18
    np.testing.assert_array_equal(found, before)  # it is the cache's


def test_flip_alone_is_a_mirror():
    found = squashed((2, 2))
    results = [augment(found, np.random.default_rng(seed), True, 0, (2, 2)) for seed in range(20)]
    mirrored = sum(np.array_equal(result[0], found[0][:, ::-1]) for result in results)
    same = sum(np.array_equal(result[0], found[0]) for result in results)
    assert mirrored + same == 20 and 5 < mirrored < 15
