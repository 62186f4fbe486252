"""Colours of embedded profiles become sRGB's; pictures without a profile, or with sRGB's, keep every bit."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

import icc_profiles as icc
from encoded_images import encoded
from sparsecut_jax.data import colours
from sparsecut_jax.data.images import read_image

LIMIT = 10_000
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
P3 = icc.rgb_profile(icc.DISPLAY_P3, icc.srgb_curve())
ADOBE = icc.rgb_profile(icc.ADOBE_RGB, icc.gamma(2.19921875))
GREY = icc.grey_profile(icc.gamma(1.8))
CMYK = icc.cmyk_profile({
    (0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (55, -37, -50), (0, 1, 0, 0): (48, 74, -3), (0, 0, 1, 0): (89, -5, 93),
})  # fmt: skip
PILLOWS = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def read(picture: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    image = read_image(encoded(picture, kind, **options), LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("profile", "given", "expected"),
    [
        # By the matrices and curves that the standards publish, in floats: 217.9, 23.7, 40.0
        (P3, (200, 50, 50), (218, 24, 40)),
        (P3, (60, 120, 180), (30, 122, 185)),
        (P3, (255, 0, 0), (255, 0, 0)),  # a red that sRGB does not have
        (P3, (128, 128, 128), (128, 128, 128)),
        (ADOBE, (200, 50, 50), (232, 46, 46)),  # 232.2, 46.4, 46.4
        (ADOBE, (60, 120, 180), (0, 121, 184)),
        (ADOBE, (255, 255, 255), (255, 255, 255)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_of_another_space(profile, given, expected, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = read(Image.new("RGB", (8, 8), given), kind, icc_profile=profile, **options)
    np.testing.assert_allclose(found, np.broadcast_to(expected, (8, 8, 3)), atol=1)


def test_every_pixel_is_what_little_cms_makes_of_it():
    source = ImageCms.ImageCmsProfile(io.BytesIO(P3))
    expected = ImageCms.profileToProfile(Image.fromarray(NOISE), source, ImageCms.createProfile("sRGB"))
    np.testing.assert_array_equal(read(Image.fromarray(NOISE), icc_profile=P3), np.asarray(expected))


@pytest.mark.parametrize(
    "profile",
    [None, PILLOWS, icc.rgb_profile(icc.SRGB, icc.srgb_curve()), icc.rgb_profile(icc.SRGB, icc.srgb_table())],
    ids=["none", "Pillow's", "formula", "table"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_srgb_keeps_every_bit(profile, kind):
    data = encoded(Image.fromarray(NOISE), kind, icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(read_image(data, LIMIT)), np.asarray(Image.open(io.BytesIO(data))))
    image = Image.fromarray(NOISE)
    assert colours.to_srgb(image, profile) is image


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize(
    "profile",
    [b"", b"no profile", P3[:200], P3[:127], bytes(5000), P3 + bytes(colours.LARGEST), PILLOWS[:40] + bytes(400)],
    ids=["empty", "text", "cut", "header", "zeros", "huge", "damaged"],
)
def test_a_broken_profile_is_ignored(mode, profile):
    image = Image.new(mode, (4, 4), 77)
    assert colours.to_srgb(image, profile) is image


@pytest.mark.parametrize(
    ("mode", "profile"), [("L", P3), ("RGB", GREY), ("RGB", CMYK), ("CMYK", P3), ("LAB", P3), ("L", CMYK)]
)
def test_a_profile_for_other_pixels_is_ignored(mode, profile):
    image = Image.new(mode, (4, 4), 77)
    assert colours.to_srgb(image, profile) is image


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_of_another_curve(mode):
    """(100 / 255) ** 1.8 = 0.1854, for which sRGB has 119.4."""
    value = {"L": 100, "LA": (100, 255), "I;16": 100 << 8}[mode]
    found = read(Image.new(mode, (8, 8), value), "TIFF" if mode == "I;16" else "PNG", icc_profile=GREY)
    np.testing.assert_allclose(found, 119, atol=1)
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize(
    ("ink", "with_profile", "without"),  # the profile's Lab values as sRGB, and Pillow's product of inks
    [
        ((0, 0, 0, 0), (255, 255, 255), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 151, 218), (0, 255, 255)),
        ((0, 255, 0, 0), (216, 10, 122), (255, 0, 255)),
        ((0, 0, 255, 0), (247, 224, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(ink, with_profile, without, kind):
    picture = Image.new("CMYK", (16, 16), ink)
    for profile, expected in ((CMYK, with_profile), (None, without)):
        found = read(picture, kind, icc_profile=profile)
        np.testing.assert_allclose(found, np.broadcast_to(expected, (16, 16, 3)), atol=2)


def test_what_is_transparent_stays_so_and_white_is_srgbs():
    picture = Image.new("RGBA", (8, 8), (200, 50, 50, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 4))
    picture.paste((200, 50, 50, 51), (0, 6, 8, 8))  # one fifth of the colour
    found = read(picture, icc_profile=P3)
    np.testing.assert_allclose(found[0, 0], 255)
    np.testing.assert_allclose(found[5, 5], (218, 24, 40), atol=1)
    np.testing.assert_allclose(found[7, 7], (248, 209, 212), atol=1)


@pytest.mark.parametrize("transparency", [None, 1])
def test_a_palette(transparency):
    picture = Image.new("P", (8, 8))
    picture.putpalette([200, 50, 50, 0, 0, 0])
    picture.paste(1, (0, 0, 8, 4))
    options = {} if transparency is None else {"transparency": transparency}
    found = read(picture, icc_profile=P3, **options)
    np.testing.assert_allclose(found[7, 7], (218, 24, 40), atol=1)
    np.testing.assert_allclose(found[0, 0], 0 if transparency is None else 255)


def test_it_stands_upright_all_the_same():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (8, 4), (200, 50, 50))
    picture.paste((0, 0, 0), (0, 0, 2, 4))
    found = read(picture, exif=exif, icc_profile=P3)
    assert found.shape == (8, 4, 3)
    np.testing.assert_allclose(found[[0, -1], 0], [(0, 0, 0), (218, 24, 40)], atol=1)
