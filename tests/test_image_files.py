"""What an image file looks like once it is read, whatever its format and mode."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from encoded_images import chunk, encoded, png
from sparsecut_jax.data.images import read_image

LIMIT = 10_000
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
WHITE, RED, GREEN = (255, 255, 255), (250, 0, 0), (0, 200, 0)


def read(data: bytes) -> np.ndarray:
    image = read_image(data, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_exact_formats(kind):
    np.testing.assert_array_equal(read(encoded(Image.fromarray(NOISE), kind)), NOISE)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "MPO", "GIF"])
def test_other_formats(kind):
    grey = Image.new("RGB", (30, 40), (90, 100, 110))
    np.testing.assert_allclose(read(encoded(grey, kind)), np.asarray(grey), atol=3)


def test_bytes_and_a_file_are_the_same(tmp_path):
    data = encoded(Image.fromarray(NOISE), "PNG")
    (tmp_path / "contents_count.jpg").write_bytes(data)
    for source in (tmp_path / "contents_count.jpg", str(tmp_path / "contents_count.jpg"), data):
        np.testing.assert_array_equal(read_image(source, LIMIT), NOISE)


def test_a_jpeg_is_decoded_as_it_is():
    """No shortcut of the decoder: its smaller sizes are off by several levels."""
    data = encoded(Image.fromarray(NOISE).resize((99, 99)), "JPEG")
    np.testing.assert_array_equal(read(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "corners"),  # top left, top right, bottom left, bottom right; stored as a b c d
    [(1, "abcd"), (2, "badc"), (3, "dcba"), (4, "cdab"), (5, "acbd"), (6, "cadb"), (7, "dbca"), (8, "bdac"), (9, "abcd")],
)  # fmt: skip
def test_every_orientation(kind, orientation, corners):
    brightness = dict(zip("abcd", (0, 80, 160, 240), strict=True))
    stored = np.array(
        [[brightness["a"]] * 32 + [brightness["b"]] * 32, [brightness["c"]] * 32 + [brightness["d"]] * 32]
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read(encoded(Image.fromarray(stored.astype(np.uint8).repeat(16, 0)), kind, exif=exif))
    assert found.shape == ((64, 32, 3) if 5 <= orientation <= 8 else (32, 64, 3))
    seen = found[[[2, 2], [-3, -3]], [[2, -3], [2, -3]], 0]
    np.testing.assert_allclose(seen.ravel(), [brightness[c] for c in corners], atol=6)


def test_damaged_exif_data_do_not_matter():
    data = encoded(Image.fromarray(NOISE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff and no more")
    np.testing.assert_array_equal(read(data), NOISE)


@pytest.mark.parametrize(
    ("mode", "value", "kind", "expected"),
    [
        ("RGBA", (200, 100, 50, 255), "PNG", (200, 100, 50)),
        ("LA", (77, 255), "PNG", (77, 77, 77)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", WHITE),
        ("1", 0, "TIFF", (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),  # stored inverted, as Adobe does
        ("YCbCr", (100, 128, 128), "TIFF", (100, 100, 100)),
    ],
)
def test_modes(mode, value, kind, expected):
    found = read(encoded(Image.new(mode, (6, 4), value), kind))
    np.testing.assert_allclose(found, np.broadcast_to(expected, (4, 6, 3)), atol=3 if kind == "JPEG" else 0)


def palette(mode: str = "P") -> Image.Image:
    """Two pixels, red and green."""
    picture = Image.new(mode, (2, 1))
    picture.putpalette([*RED, *GREEN])
    picture.putdata([0, 1])
    return picture


def test_palette():
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert read(encoded(palette(), kind)).tolist() == [[[*RED], [*GREEN]]]


def rgba(*pixels) -> Image.Image:
    picture = Image.new("RGBA", (len(pixels), 1))
    picture.putdata(pixels)
    return picture


@pytest.mark.parametrize(
    "data",
    [
        encoded(rgba((*RED, 0), (*GREEN, 255)), "PNG"),
        encoded(rgba((*RED, 0), (*GREEN, 255)), "WEBP", lossless=True, exact=True),
        encoded(rgba((*RED, 0), (*GREEN, 255)), "TIFF"),
        encoded(palette(), "PNG", transparency=0),
        encoded(palette(), "PNG", transparency=b"\0\xff"),
        encoded(palette(), "GIF", transparency=0),
        encoded(palette().convert("RGB"), "PNG", transparency=RED),
        png(2, 1, b"\0\xfa\x01\0\0\0\0\0\0\xc8\x02\0\0", 16, extra=chunk(b"tRNS", b"\xfa\x01\0\0\0\0")),
    ],
    ids=["rgba", "webp", "tiff", "palette", "palette alphas", "gif", "one colour", "one colour of 16 bits"],
)
def test_what_is_transparent_is_white(data):
    """Red under alpha 0 does not show."""
    assert read(data).tolist() == [[[*WHITE], [*GREEN]]]


def test_transparent_grey():
    picture = Image.new("LA", (3, 1))
    picture.putdata([(10, 0), (10, 255), (10, 128)])
    assert read(encoded(picture, "PNG"))[0, :, 0].tolist() == [255, 10, 132]
    deep = png(2, 1, b"\0\x12\x34\x80\0", 16, 0, chunk(b"tRNS", b"\x12\x34"))
    assert read(deep)[0].tolist() == [[*WHITE], [128, 128, 128]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "big-endian TIFF", "32-bit TIFF"])
def test_16_bits_of_grey_become_8(kind):
    values = np.array([[0x0000, 0x00FF, 0x4000, 0x8000, 0xFFFF]], np.uint16)
    if kind == "big-endian TIFF":
        data = encoded(Image.fromarray(values.astype(">u2")), "TIFF")
        assert Image.open(io.BytesIO(data)).mode == "I;16B"
    elif kind == "32-bit TIFF":
        data = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
        assert Image.open(io.BytesIO(data)).mode == "I"
    else:
        data = encoded(Image.fromarray(values), kind)
    assert read(data)[0].tolist() == [[v, v, v] for v in (0, 0, 64, 128, 255)]


def test_16_bits_of_colour_become_8():
    assert read(png(1, 1, b"\0\x12\x34\x56\x78\x9a\xbc", 16)).tolist() == [[[0x12, 0x56, 0x9A]]]


@pytest.mark.parametrize("top", [1, 255, 65535, 1e6])
def test_floats_become_8_bits(top):
    values = np.array([[0, 0.5, 1, -1, np.nan]], np.float32) * np.float32(top)
    assert read(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0, 0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, GREEN, (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_allclose(read(data), np.broadcast_to(RED, (4, 6, 3)), atol=2)


@pytest.mark.parametrize("kind", [b"zTXt", b"tEXt", b"iTXt", b"iCCP"])
def test_a_png_with_a_large_text_or_profile(kind):
    """Of 3 MiB, above Pillow's own limit; the profile is none, and ignored."""
    large = bytes(3 << 20) if kind == b"iCCP" else b"x" * (3 << 20)
    data = {
        b"zTXt": b"note\0\0" + zlib.compress(large),
        b"tEXt": b"note\0" + large,
        b"iTXt": b"note\0\1\0\0\0" + zlib.compress(large),
        b"iCCP": b"profile\0\0" + zlib.compress(large),
    }[kind]
    pixels = b"".join(b"\0" + row.tobytes() for row in NOISE)
    np.testing.assert_array_equal(read(png(30, 40, pixels, extra=chunk(kind, data))), NOISE)
