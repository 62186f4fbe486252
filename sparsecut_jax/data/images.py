"""An image file becomes the views of the model: one low-res view and four hi-res crops."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sparsecut_jax.types import UserError

BORDER = (123, 117, 104)  # mean colour of CLIP's training images: what `pad` fills up with
Image.MAX_IMAGE_PIXELS = None  # `read_image` has a limit of its own, which the config sets
BICUBIC = Image.Resampling.BICUBIC
LOW_RES_AND_CROPS = 5


def resolve(folder: str | os.PathLike, name: str) -> Path:
    """Path of image `name` in `folder`. Raises UserError if it leaves the folder or is not there."""
    try:
        root = Path(folder).resolve()
        path = (root / name).resolve()
        inside, there = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # no file can have such a name, or a link leads to itself
        raise UserError(f"image {name!r} in {str(folder)!r} cannot be found: {error}") from error
    if not inside:
        raise UserError(f"image {name!r} leaves its folder {root}")
    if not there:
        raise UserError(f"image {path} is not there")
    return path


def read_image(path: str | os.PathLike, max_pixels: int) -> Image.Image:
    """RGB image of a file. Raises UserError for what is no image, or has more than `max_pixels`."""
    try:
        with Image.open(path) as image:
            width, height = image.size  # from the header: nothing is decoded yet
            if width * height > max_pixels:
                raise UserError(
                    f"image {path} has {width} x {height} pixels, more than config.data.max_pixels={max_pixels}"
                )
            if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip them
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"image {path} is not there") from None
    except UserError:
        raise
    except Exception as error:  # every decoder fails in its own way
        raise UserError(f"image {path} cannot be read as an image: {error}") from error


def square(image: Image.Image, size: int, fit: str) -> Image.Image:
    """The image as size x size pixels.

    fit: "pad" adds a border in the mean colour (LLaVA-1.5), "squash" ignores the aspect ratio, "crop"
    takes the middle.
    """
    width, height = image.size
    side = max(width, height) if fit == "pad" else min(width, height)
    if width != height and fit == "pad":
        canvas = Image.new("RGB", (side, side), BORDER)
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    elif width != height and fit == "crop":
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if image.size == (size, size) else image.resize((size, size), BICUBIC)


def views(image: Image.Image, size: int, count: int, fit: str) -> np.ndarray:
    """uint8[V, S, S, 3]: the low-res view, then the crops TL, TR, BL, BR of the image at twice the size.

    Both resolutions are made from the same square, so they line up. `count` is 1 (low-res alone) or 5.
    """
    low = np.asarray(square(image, size, fit))[None]
    if count == 1:
        return low
    canvas = np.asarray(square(image, 2 * size, fit))
    crops = canvas.reshape(2, size, 2, size, 3).swapaxes(1, 2).reshape(4, size, size, 3)
    return np.concatenate([low, crops])


def augment(views: np.ndarray, rng: np.random.Generator, flip: bool, shift: int) -> np.ndarray:
    """The same views of a picture that was mirrored (half of the time) and moved by up to `shift` low-res pixels.

    Both resolutions move together; what comes in at the border repeats the border.

    Args:
      views: uint8[V, S, S, 3].
    """
    count, size = views.shape[:2]
    mirror = flip and rng.random() < 0.5
    dy, dx = rng.integers(-shift, shift + 1, 2) if shift else (0, 0)
    moved = [_move(views[0], dy, dx, mirror)]
    if count == LOW_RES_AND_CROPS:
        canvas = views[1:].reshape(2, 2, size, size, 3).swapaxes(1, 2).reshape(2 * size, 2 * size, 3)
        canvas = _move(canvas, 2 * dy, 2 * dx, mirror)
        moved += list(canvas.reshape(2, size, 2, size, 3).swapaxes(1, 2).reshape(4, size, size, 3))
    return np.stack(moved)


def _move(picture: np.ndarray, dy: int, dx: int, mirror: bool) -> np.ndarray:
    rows = np.clip(np.arange(picture.shape[0]) - dy, 0, picture.shape[0] - 1)
    columns = np.clip(np.arange(picture.shape[1]) - dx, 0, picture.shape[1] - 1)
    return picture[rows][:, columns[::-1] if mirror else columns]
