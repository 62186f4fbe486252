"""Turns an image into the model's views: one low-res view and a grid of hi-res crops.

Both are cut from the same square picture, so they line up: with a grid of 2 x 2 the crops are the quarters (top left,
top right, bottom left, bottom right) of the picture at twice the size.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import IO

import numpy as np
from etils import epath
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sparsecut_jax.data.colours import to_srgb
from sparsecut_jax.data.image_names import what_else
from sparsecut_jax.types import BadSample, UserError

BICUBIC = Image.Resampling.BICUBIC
MOST_PIXELS = 2**26  # of intermediate images, four bytes each
LONGEST_SIDE = 65_535  # pixels, JPEG's own limit: work grows with the side, not only with the number of pixels
Image.MAX_IMAGE_PIXELS = None  # `read_image` has its own limit, set by the config
# Uncompressed bytes of a PNG's text or ICC chunks: Pillow would refuse a valid image above 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26
Image.init()
# Each of these knows all of its size before decoding. Others run programs (EPS), hide a second image of any size (ICO)
# or accept files that are not images (TGA).
FORMATS = sorted({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"} & set(Image.OPEN))
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: str | os.PathLike | bytes | Image.Image, max_pixels: int, name: str = "") -> Image.Image:
    """RGB image of a file, of a file's bytes or of any Pillow image; `name` is what errors call it.

    It is turned upright (EXIF); the first frame of an animation is used, transparent parts become white, 16 bits per
    channel become 8, and colours of another ICC profile become sRGB.

    Raises:
      BadSample: the file is not an image, is damaged, does not exist, or has more than `max_pixels`.
    """
    name = name or (f"of {len(source)} bytes" if isinstance(source, bytes) else str(source) or "''")
    try:
        with _image(source) as image:
            width, height = image.size  # from the header: nothing is decoded yet
            if width * height > max_pixels:
                limit = f"config.data.max_pixels={max_pixels}"
                raise BadSample("too_large_image", f"image {name} has {width} x {height} pixels, more than {limit}")
            if max(width, height) > LONGEST_SIDE:
                sentence = f"image {name} has {width} x {height} pixels, more than {LONGEST_SIDE} in one direction"
                raise BadSample("too_large_image", sentence)
            image.load()
            return _upright(_rgb(image), image)
    except FileNotFoundError:
        raise BadSample("missing_image", f"image {name} does not exist") from None
    except (UserError, MemoryError):
        raise
    except ImportError as error:  # not the image's fault: the package that reads gs:// is not installed
        raise UserError(f"image {name} cannot be read: {error}") from error
    except Exception as error:  # every decoder fails in its own way
        raise BadSample("broken_image", f"image {name} cannot be read as an image: {error}") from error


@contextlib.contextmanager
def _image(source: str | os.PathLike | bytes | Image.Image) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        yield source
        return
    with _open(source) as file, _identify(file) as image:
        yield image


def _open(source: str | os.PathLike | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if "://" in os.fspath(source):
        return io.BytesIO(epath.Path(source).read_bytes())
    if kind := what_else(source):  # opening a named pipe would wait forever
        raise BadSample("missing_image", f"image {os.fspath(source)} is {kind}, not a file")
    return open(source, "rb")


def _identify(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
        reason = (
            f"its format is unknown or its header is damaged; it starts with {start!r}"
            if start
            else "the file is empty"
        )
        raise ValueError(reason) from None


def _rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:  # of a PNG with 16 bits a channel
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    image = to_srgb(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values beyond 8 bits, which Pillow would clip: of 16-bit integers the upper 8 bits are kept, as Pillow does
    with colours; floats are scaled from 1, 255 or 65535, the smallest of these that no value exceeds."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        top = next((top for top in (1, 255, 65535) if values.max() <= top), values.max())
        return Image.fromarray(np.floor(values.clip(0) / top * 255 + 0.5).astype(np.uint8))
    pixels = (values.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    if "transparency" in image.info:
        pixels[values == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF data are no reason to drop an image
        orientation = source.getexif().get(ORIENTATION, 1)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


# ----------------------------------------------------------------------------------------------------------------------
# Views


def border_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
    """The colour that `pad` fills with: `config.vision.mean`, rounded down as in LLaVA."""
    return tuple(int(value * 255) for value in mean)


def views(
    image: Image.Image, size: int, grid: tuple[int, int] | None, fit: str, border: tuple[int, ...] = (0, 0, 0)
) -> np.ndarray:
    """uint8[V, S, S, 3]: the low-res view, then the rows * columns crops of `grid` (None: no crops), row by row.

    fit, border: see `square`.
    """
    rows, columns = grid or (0, 0)
    result = np.empty((1 + rows * columns, size, size, 3), np.uint8)
    result[0] = square(image, size, size, fit, border)
    if grid:
        result[1:] = _cut(np.asarray(square(image, columns * size, rows * size, fit, border)), grid)
    return result


def square(image: Image.Image, width: int, height: int, fit: str, border: tuple[int, ...] = (0, 0, 0)) -> Image.Image:
    """A square picture of the image, as width x height pixels.

    fit: "pad" adds borders of that colour on the short sides (LLaVA-1.5), "squash" ignores the aspect ratio, "crop" takes
    the middle, exactly as CLIP's image processor does.
    """
    w, h = image.size
    if fit == "squash" or w == h:
        return image.resize((width, height), BICUBIC)
    if fit == "pad":
        side = max(w, h)
        # Along rows first, as Pillow does with a square; but of a very tall image that would take a huge canvas.
        for axis in (1, 0) if h == side and side**2 > MOST_PIXELS else (0, 1):
            image = _pad(image, axis, side, (width, height)[axis], border)
        return image
    short = min(w, h)
    wide, high = int(width * w / short), int(height * h / short)  # both at least width and height
    left, top = (wide - width) // 2, (high - height) // 2
    if wide * high <= MOST_PIXELS:  # a `box` would be faster, but then Pillow may take the axes in another order
        return image.resize((wide, high), BICUBIC).crop((left, top, left + width, top + height))
    box = (left * w / wide, top * h / high, (left + width) * w / wide, (top + height) * h / high)
    return image.resize((width, height), BICUBIC, box)


def _pad(image: Image.Image, axis: int, side: int, size: int, border: tuple[int, ...]) -> Image.Image:
    """One axis of `pad`: the image is centred in `side` pixels, which are resized to `size`.

    Bit-identical to a canvas of side x side pixels, but only what depends on the image is computed.
    """
    length = image.size[axis]
    offset, scale = (side - length) // 2, side / size
    reach = 2 * max(scale, 1) + 1  # source pixels that bicubic reads on either side, plus one
    first, last = (offset - reach) / scale, (offset + length + reach) / scale  # output pixels that depend on the image
    # Where `step` output pixels are a whole number of source pixels, a part is computed as it is within the whole.
    step = size // math.gcd(side, size)
    first, last = max(0, math.floor(first / step) * step), min(size, math.ceil(last / step) * step)
    low, high = max(0, math.floor(first * scale - reach)), min(side, math.ceil(last * scale + reach))
    canvas = lambda n: Image.new("RGB", (n, image.height) if axis == 0 else (image.width, n), border)
    along = lambda begin, end: (begin, 0, end, image.height) if axis == 0 else (0, begin, image.width, end)
    strip = image
    if length < side:
        strip = canvas(high - low)
        strip.paste(image, along(offset - low, 0)[:2])
    box = along(first * side / size - low, last * side / size - low)
    part = strip.resize(along(0, last - first)[2:], BICUBIC, box)
    if last - first == size:
        return part
    result = canvas(size)
    result.paste(part, along(first, 0)[:2])
    return result


def enlarged(views: np.ndarray, size: int) -> np.ndarray:
    """The same views with sides of `size` pixels: uint8[V, S, S, 3] -> uint8[V, size, size, 3], each resized on its own."""
    if views.shape[1] == size:
        return views
    return np.stack([np.asarray(Image.fromarray(view).resize((size, size), BICUBIC)) for view in views])


def augment(views: np.ndarray, rng: np.random.Generator, flip: bool, shift: int, grid: tuple[int, int]) -> np.ndarray:
    """The same views of a picture that was mirrored (half of the time) and moved by up to `shift` low-res pixels.

    Both resolutions move together; new pixels at the border repeat the border.

    Args:
      views: uint8[V, S, S, 3].
      grid: rows and columns of the crops, if there are any.
    """
    mirror = flip and rng.random() < 0.5
    dy, dx = rng.integers(-shift, shift + 1, 2) if shift else (0, 0)
    result = np.empty_like(views)
    result[0] = _move(views[0], dy, dx, mirror)
    if len(views) > 1:
        rows, columns = grid
        result[1:] = _cut(_move(canvas(views[1:], grid), rows * dy, columns * dx, mirror), grid)
    return result


def canvas(crops: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Crops [rows * columns, S, S, 3], row by row, put together again: [rows * S, columns * S, 3]."""
    rows, columns, size = *grid, crops.shape[1]
    return crops.reshape(rows, columns, size, size, 3).swapaxes(1, 2).reshape(rows * size, columns * size, 3)


def _cut(whole: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The reverse of `canvas`."""
    rows, columns = grid
    size = whole.shape[0] // rows
    return whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def _move(picture: np.ndarray, dy: int, dx: int, mirror: bool) -> np.ndarray:
    rows = np.clip(np.arange(picture.shape[0]) - dy, 0, picture.shape[0] - 1)
    columns = np.clip(np.arange(picture.shape[1]) - dx, 0, picture.shape[1] - 1)
    return picture[rows][:, columns[::-1] if mirror else columns]
