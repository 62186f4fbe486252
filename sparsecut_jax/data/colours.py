"""Converts images with embedded ICC profiles to sRGB.

Vision towers were trained on sRGB. Phone photos are in Display P3, scans and prints in Adobe RGB, CMYK or
various greys; read as sRGB, their colours are wrong.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode of its pixels
# Profiles of sRGB differ in the rounding of their tables; other spaces differ more.
SAME = 2  # levels of 255
LARGEST = 2**23  # bytes of a profile


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in sRGB, as RGB or RGBA; the same object if the profile changes nothing.

    That is the case without a profile, with sRGB's, and with one that is damaged or for other pixels, which is ignored.
    """
    mode = {"RGB": "RGB", "P": "RGB", "L": "L", "1": "L", "CMYK": "CMYK"}.get(image.mode.rstrip("AXa"))
    transform = _transform(profile, mode) if profile and mode and len(profile) <= LARGEST else None
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform from a profile to sRGB; None if it is not needed or not possible."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if SPACES.get(source.profile.xcolor_space) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # Little CMS fails in several ways
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(256, dtype=np.uint8)
    if mode == "RGB":
        steps = np.linspace(0, 255, 16).astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
        levels = np.concatenate([grid, np.repeat(levels[:, None], 3, 1)])
    given = Image.fromarray(levels[None])
    converted = np.asarray(ImageCms.applyTransform(given, transform), np.int16)
    return transform if np.abs(converted - np.asarray(given.convert("RGB"), np.int16)).max() > SAME else None
