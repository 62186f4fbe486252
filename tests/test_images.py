"""From an image file to views."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sparsecut_jax.data.images import BORDER, augment, read_image, resolve, square, views
from sparsecut_jax.types import UserError

LIMIT = 10_000
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


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


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more than the file holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


# ----------------------------------------------------------------------------------------------------------------------
# square


WIDE = image([10, 20, 30, 40], [50, 60, 70, 80])
TALL = image([10, 50], [20, 60], [30, 70], [40, 80])


def test_pad_adds_the_mean_colour_above_and_below():
    padded = np.asarray(square(WIDE, 4, "pad"))
    assert (padded[[0, 3]] == BORDER).all()
    assert grey(padded[1:3]) == [[10, 20, 30, 40], [50, 60, 70, 80]]


def test_pad_adds_the_mean_colour_left_and_right():
    padded = np.asarray(square(TALL, 4, "pad"))
    assert (padded[:, [0, 3]] == BORDER).all()
    assert grey(padded[:, 1:3]) == [[10, 50], [20, 60], [30, 70], [40, 80]]


def test_pad_puts_the_odd_row_below():
    padded = np.asarray(square(image([1, 2, 3], [4, 5, 6]), 3, "pad"))
    assert grey(padded[:2]) == [[1, 2, 3], [4, 5, 6]]
    assert padded[2].tolist() == [list(BORDER)] * 3


def test_crop_takes_the_middle():
    assert grey(square(WIDE, 2, "crop")) == [[20, 30], [60, 70]]
    assert grey(square(TALL, 2, "crop")) == [[20, 60], [30, 70]]
    assert grey(square(image([1, 2, 3], [4, 5, 6]), 2, "crop")) == [[1, 2], [4, 5]]


def test_squash_keeps_every_part():
    stripes = image(*[[0] * 8 + [100] * 8 + [200] * 8] * 3)
    np.testing.assert_allclose(grey(square(stripes, 3, "squash")), [[0, 100, 200]] * 3, atol=8)


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
def test_a_square_image_is_only_resized(fit):
    picture = Image.fromarray(NOISE[:30])
    assert (np.asarray(square(picture, 30, fit)) == NOISE[:30]).all()
    resized = picture.resize((12, 12), Image.Resampling.BICUBIC)
    assert (np.asarray(square(picture, 12, fit)) == np.asarray(resized)).all()


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_shapes(fit, size):
    assert square(Image.new("RGB", size), 8, fit).size == (8, 8)


# ----------------------------------------------------------------------------------------------------------------------
# views


def test_crops_are_the_quarters_of_the_canvas():
    picture = coordinates(8, 8)
    canvas = np.asarray(picture)
    found = views(picture, 4, 5, "pad")
    assert found.shape == (5, 4, 4, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[1], canvas[:4, :4])
    np.testing.assert_array_equal(found[2], canvas[:4, 4:])
    np.testing.assert_array_equal(found[3], canvas[4:, :4])
    np.testing.assert_array_equal(found[4], canvas[4:, 4:])


def test_view_0_is_the_image_at_low_resolution():
    picture = Image.fromarray(NOISE[:16, :16])
    np.testing.assert_array_equal(views(picture, 16, 5, "pad")[0], NOISE[:16, :16])
    np.testing.assert_array_equal(views(picture, 16, 1, "pad"), NOISE[None, :16, :16])


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_both_resolutions_line_up(fit, shape):
    """Every low-res pixel has the colour of the four hi-res pixels at its place."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack([y * 3, x * 3, 255 - y - x], -1).astype(np.uint8)
    low, top_left, top_right, bottom_left, bottom_right = views(Image.fromarray(smooth), 16, 5, fit).astype(float)
    canvas = np.vstack([np.hstack([top_left, top_right]), np.hstack([bottom_left, bottom_right])])
    mean = canvas.reshape(16, 2, 16, 2, 3).mean((1, 3))
    middle = (slice(6, 10), slice(1, 15)) if shape[0] < shape[1] else (slice(1, 15), slice(6, 10))
    assert np.ptp(low[middle], (0, 1)).max() > 50
    np.testing.assert_allclose(mean[middle], low[middle], atol=4)


# ----------------------------------------------------------------------------------------------------------------------
# augment


def canvas_of(crops: np.ndarray) -> np.ndarray:
    return np.vstack([np.hstack(list(crops[:2])), np.hstack(list(crops[2:]))])


def moved(picture: np.ndarray, dy: int, dx: int, mirror: bool) -> np.ndarray:
    """`picture` moved down by dy and right by dx, its border repeated, then mirrored."""
    size, reach = len(picture), max(abs(dy), abs(dx))
    wide = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), "edge")
    cut = wide[reach - dy : reach - dy + size, reach - dx : reach - dx + size]
    return cut[:, ::-1] if mirror else cut


def test_augment_does_nothing_when_told_so():
    found = views(Image.fromarray(NOISE), 8, 5, "squash")
    np.testing.assert_array_equal(augment(found, np.random.default_rng(0), flip=False, shift=0), found)


@pytest.mark.parametrize("count", [1, 5])
def test_augment_moves_both_resolutions_together(count):
    found = views(Image.fromarray(NOISE), 8, count, "squash")
    before = found.copy()
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        result = augment(found, rng, flip=True, shift=1)
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
        if count == 5:
            dy, dx, mirror = matches[0]
            expected = moved(canvas_of(found[1:]), 2 * dy, 2 * dx, mirror)
            np.testing.assert_array_equal(canvas_of(result[1:]), expected)
    assert len(seen) == 18
    np.testing.assert_array_equal(found, before)  # it is the cache's


def test_flip_alone_is_a_mirror():
    found = views(Image.fromarray(NOISE), 8, 5, "squash")
    results = [augment(found, np.random.default_rng(seed), flip=True, shift=0) for seed in range(20)]
    mirrored = sum(np.array_equal(result[0], found[0][:, ::-1]) for result in results)
    same = sum(np.array_equal(result[0], found[0]) for result in results)
    assert mirrored + same == 20 and 5 < mirrored < 15


# ----------------------------------------------------------------------------------------------------------------------
# files


def read(tmp_path, data: bytes, name: str = "image.png") -> np.ndarray:
    (tmp_path / name).write_bytes(data)
    result = read_image(tmp_path / name, LIMIT)
    assert result.mode == "RGB"
    return np.asarray(result)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_exact_formats(tmp_path, kind):
    np.testing.assert_array_equal(read(tmp_path, encoded(Image.fromarray(NOISE), kind)), NOISE)


def test_contents_count_and_not_the_name(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, encoded(Image.fromarray(NOISE), "PNG"), "image.jpg"), NOISE)


def test_palette(tmp_path):
    picture = Image.new("P", (6, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    assert (read(tmp_path, encoded(picture, "PNG")) == (10, 20, 30)).all()
    assert read(tmp_path, encoded(picture, "GIF")).shape == (4, 6, 3)
    assert read(tmp_path, encoded(picture, "PNG", transparency=0)).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("mode", "value", "kind", "expected"),
    [
        ("RGBA", (200, 100, 50, 255), "PNG", (200, 100, 50)),
        ("LA", (77, 255), "PNG", (77, 77, 77)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
    ],
)
def test_modes(tmp_path, mode, value, kind, expected):
    assert (read(tmp_path, encoded(Image.new(mode, (6, 4), value), kind)) == expected).all()


def test_cmyk_jpeg(tmp_path):
    found = read(tmp_path, encoded(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "JPEG"))
    np.testing.assert_allclose(found, np.broadcast_to((255, 0, 0), (4, 6, 3)), atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "expected"), [(0x0000, 0), (0x4000, 64), (0x8000, 128), (0xFFFF, 255)])
def test_16_bits_become_8(tmp_path, kind, value, expected):
    found = read(tmp_path, encoded(Image.fromarray(np.full((4, 6), value, np.uint16)), kind))
    np.testing.assert_allclose(found, np.full((4, 6, 3), expected), atol=1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_truncated_file(tmp_path, kind, share):
    data = encoded(Image.fromarray(NOISE), kind)
    with pytest.raises(UserError, match=r"^image .*image\.png cannot be read as an image: "):
        read(tmp_path, data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>404</html>", b"\0" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image(tmp_path, data):
    with pytest.raises(UserError, match=r"^image .*page\.jpg cannot be read as an image: "):
        read(tmp_path, data, "page.jpg")


def test_a_decoder_that_fails_in_its_own_way(tmp_path, monkeypatch):
    """AVIF's raises RuntimeError where the pixels are damaged."""

    def fail(*_):
        raise RuntimeError("decoding of color planes failed")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match=r"image\.png cannot be read as an image: decoding of color planes failed"):
        read(tmp_path, encoded(Image.fromarray(NOISE), "PNG"))


def test_an_image_that_is_too_large_is_refused_before_decoding(tmp_path):
    with pytest.raises(UserError, match=r"image\.png is too large|has 100000 x 100000 pixels"):
        read(tmp_path, png_of_size(100_000, 100_000))


def test_max_pixels_is_the_last_size_allowed(tmp_path):
    assert read(tmp_path, encoded(Image.new("RGB", (100, 100)), "PNG")).shape == (100, 100, 3)
    with pytest.raises(UserError) as caught:
        read(tmp_path, png_of_size(100, 101))
    path = tmp_path / "image.png"
    assert str(caught.value) == f"image {path} has 100 x 101 pixels, more than config.data.max_pixels=10000"


def test_a_folder_and_nothing_at_all(tmp_path):
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(tmp_path, LIMIT)
    with pytest.raises(UserError, match=r"^image .*none\.png is not there$"):
        read_image(tmp_path / "none.png", LIMIT)


# ----------------------------------------------------------------------------------------------------------------------
# resolve


@pytest.fixture
def folder(tmp_path):
    """images/a.png, images/deep/b.png, and secret.png beside the folder."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("images/a.png", "images/deep/b.png", "secret.png", "images-2.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["a.png", "deep/b.png", "./a.png", "deep/../a.png", "deep//b.png"])
def test_inside(folder, name):
    assert resolve(folder, name).samefile(folder / name)
    assert resolve(str(folder) + "/", name).is_absolute()


@pytest.mark.parametrize("name", ["../secret.png", "deep/../../secret.png", "..", "../images-2.png", "/etc/hostname"])
def test_outside(folder, name):
    with pytest.raises(UserError) as caught:
        resolve(folder, name)
    assert str(caught.value) == f"image {name!r} leaves its folder {folder.resolve()}"


def test_absolute_path_of_a_file_outside(folder):
    with pytest.raises(UserError, match="leaves its folder"):
        resolve(folder, str(folder.parent / "secret.png"))


def test_symlinks(folder):
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    assert resolve(folder, "in.png") == (folder / "a.png").resolve()
    for name in ("out.png", "up/secret.png"):
        with pytest.raises(UserError, match="leaves its folder"):
            resolve(folder, name)


@pytest.mark.parametrize("name", ["b.png", "deep", "", ".", "a.png/c.png", "~/a.png"])
def test_not_there(folder, name):
    with pytest.raises(UserError, match=r"^image .* is not there$"):
        resolve(folder, name)


@pytest.mark.parametrize("name", ["a\0.png", "a" * 300, "\ud800.png"], ids=["nul", "long", "surrogate"])
def test_names_that_no_file_can_have(folder, name):
    with pytest.raises(UserError, match="^image "):
        resolve(folder, name)


def test_symlink_that_leads_to_itself(folder):
    (folder / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match="^image "):
        resolve(folder, "loop.png")
