"""Image files that are refused, with the cause and the sentence; and reading from a bucket."""

import functools
import os
import struct
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image, ImageFile

from encoded_images import chunk, encoded, png
from sparsecut_jax.data.image_names import resolve
from sparsecut_jax.data.images import read_image
from sparsecut_jax.types import BadSample, UserError
from tiny import refusal

LIMIT = 10_000
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def read(data: bytes) -> np.ndarray:
    image = read_image(data, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image)


def cause(reader, *inputs, **options) -> str:
    with pytest.raises(BadSample) as caught:
        reader(*inputs, **options)
    return caught.value.cause


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_file(kind, share):
    data = encoded(Image.fromarray(NOISE), kind)
    assert cause(read, data[: int(share * len(data))]) == "broken_image"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "its format is unknown or its header is damaged; it starts with b'<!DOCTYPE html><'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "its format is unknown or its header is damaged; it starts with b'%!PS-Adobe-3.0 E'"),
    ],
)  # fmt: skip
def test_what_is_no_image(tmp_path, data, reason):
    path = tmp_path / "page.jpg"
    path.write_bytes(data)
    assert refusal(read_image, path, LIMIT) == f"image {path} cannot be read as an image: {reason}"
    assert refusal(read_image, data, LIMIT, "row 3") == f"image row 3 cannot be read as an image: {reason}"
    assert refusal(read_image, data, LIMIT) == f"image of {len(data)} bytes cannot be read as an image: {reason}"
    assert cause(read_image, data, LIMIT) == "broken_image"


def test_a_decoder_that_fails_in_its_own_way(monkeypatch):
    """AVIF's raises RuntimeError where the pixels are damaged."""

    def fail(_):
        raise RuntimeError("decoding of color planes failed")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(BadSample, match=r"^image x cannot be read as an image: decoding of color planes failed$"):
        read_image(encoded(Image.fromarray(NOISE), "PNG"), LIMIT, "x")


def test_max_pixels_is_the_last_size_allowed(tmp_path):
    assert read(encoded(Image.new("RGB", (100, 100)), "PNG")).shape == (100, 100, 3)
    path = tmp_path / "image.png"
    path.write_bytes(png(100, 101, b""))
    sentence = f"image {path} has 100 x 101 pixels, more than config.data.max_pixels=10000"
    assert refusal(read_image, path, LIMIT) == sentence
    assert cause(read_image, path, LIMIT) == "too_large_image"


BOMB = png(100_000, 100_000, b"\0" * 9)
ICON = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(BOMB), 22) + BOMB


def gif_of_a_larger_frame() -> bytes:
    """A screen of 1 x 1 pixels, and a frame of 3000 x 3000."""
    data = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    at = data.index(b",")
    data[at + 5 : at + 9] = struct.pack("<HH", 3000, 3000)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (BOMB, "too_large_image"),
        (png(2**31 - 1, 2**31 - 1, b"\0" * 9), "too_large_image"),
        (ICON, "broken_image"),
        (encoded(Image.new("RGB", (900, 900)), "WEBP"), "too_large_image"),
        (encoded(Image.new("RGB", (900, 900)), "GIF"), "too_large_image"),
        (gif_of_a_larger_frame(), "too_large_image"),
        (png(4, 4, b"\0" * 13 * 4, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))), "broken_image"),
        (png(4, 4, b"\0" * 13 * 4, extra=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8)))), "broken_image"),
    ],
    ids=[
        "100,000 squared",
        "2^31 squared",
        "an icon with such a png",
        "webp",
        "gif",
        "a frame larger than its gif",
        "text",
        "profile",
    ],
)
def test_bombs(data, expected):
    assert len(data) < 200_000
    assert cause(read, data) == expected


def test_more_data_than_pixels():
    """The rest is not unpacked."""
    assert (read(png(4, 4, bytes(10**7))) == 0).all()


def test_a_side_that_is_too_long():
    """Work grows with the longest side: 70,000 x 1 pixels are few, but their square picture is not."""
    sentence = refusal(read_image, encoded(Image.new("L", (70_000, 1)), "PNG"), 10**6, "x")
    assert sentence == "image x has 70000 x 1 pixels, more than 65535 in one direction"


def test_many_frames_are_not_looked_at(monkeypatch):
    frames = [Image.new("P", (8, 8), i) for i in range(200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(ImageFile.ImageFile, "seek", lambda *_: pytest.fail("another frame"))
    assert read(data).shape == (8, 8, 3)


@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "folder"), (os.mkfifo, "named pipe")])
def test_what_is_no_file(tmp_path, make, kind):
    """A named pipe that nobody writes to would keep its reader waiting."""
    make(tmp_path / "image.png")
    assert refusal(read_image, tmp_path / "image.png", LIMIT) == f"image {tmp_path}/image.png is a {kind}, not a file"
    assert cause(read_image, tmp_path / "image.png", LIMIT) == "missing_image"
    assert refusal(read_image, "/dev/zero", LIMIT) == "image /dev/zero is a device, not a file"


def test_nothing_there(tmp_path):
    assert refusal(read_image, tmp_path / "none.png", LIMIT) == f"image {tmp_path / 'none.png'} does not exist"
    assert cause(read_image, tmp_path / "none.png", LIMIT) == "missing_image"


# ----------------------------------------------------------------------------------------------------------------------
# gs://


def test_reading_from_a_bucket(monkeypatch):
    """What is read stands in a dict; the machine of the tests has no bucket."""
    bucket = {"gs://bucket/images/a.png": encoded(Image.fromarray(NOISE), "PNG"), "gs://bucket/images/b.png": b"<html>"}

    def read_bytes(path):
        if os.fspath(path) not in bucket:
            raise FileNotFoundError(path)
        return bucket[os.fspath(path)]

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "read_bytes", read_bytes)
    at = functools.partial(resolve, "gs://bucket/images")
    np.testing.assert_array_equal(read_image(at("a.png"), LIMIT), NOISE)
    np.testing.assert_array_equal(read_image("gs://bucket/images/a.png", LIMIT), NOISE)
    assert refusal(read_image, at("none.png"), LIMIT) == "image gs://bucket/images/none.png does not exist"
    assert cause(read_image, at("none.png"), LIMIT) == "missing_image"
    assert cause(read_image, at("b.png"), LIMIT) == "broken_image"


def test_a_bucket_that_nothing_here_can_read(monkeypatch):
    """No row is at fault, so that it is no BadSample."""

    def read_bytes(_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "read_bytes", read_bytes)
    with pytest.raises(UserError, match="^image gs://bucket/a.png cannot be read: Please install gcsfs") as caught:
        read_image("gs://bucket/a.png", LIMIT)
    assert not isinstance(caught.value, BadSample)
