"""Draws the pictures of Scenes: a coarse part, a fine part that is invisible in the low-res view, and noise.

Lengths of the coarse part are in 64ths of the picture. The fine part lies on a panel of 64 x 64 hi-res pixels (pixels of
the picture resized to twice the low-res view), so that it stays as small in a larger picture.
"""

from __future__ import annotations

import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Facts = dict[str, str]  # template -> answer

SIDE = 64  # side of the picture in its own units, and of the panel in hi-res pixels
GREY = 128.0
NOISE = 4.0  # amplitude in grey levels; masks what rounding leaves of the fine part
COLORS = {"red": (44, -24, -24), "green": (-28, 36, -28), "blue": (-26, -26, 44), "yellow": (40, 30, -44)}
WHITE, BLACK = np.full(3, GREY + 48), np.full(3, GREY - 48)
CORNERS = np.array([(9, 9), (55, 9), (9, 55), (55, 55)])
STEPS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
ACROSS = {"horizontal": (0, 1), "vertical": (1, 0), "rising": (1, 1), "falling": (1, -1)}  # a stripe's normal (x, y)
DOTS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
PATCH = 16  # side of a patch in hi-res pixels
SHIFT = 2  # maximum random offset of each fine detail, in hi-res pixels
FINE = 45.0  # contrast of the fine part


def draw(facts: Facts, seed: tuple[int, ...], size: int, low: int, fine: bool = True) -> np.ndarray:
    """uint8[size, size, 3]: a picture of which `facts` are true. `seed` determines everything else.

    Args:
      facts: {template: answer}.
      seed: of the random details.
      size: side of the picture in pixels.
      low: side of the low-res view (Pillow's bicubic size -> low), in which the fine part must be invisible.
      fine: False omits the fine part and changes nothing else.
    """
    picture = coarse_part(facts, np.random.default_rng((*seed, 0)), size)
    if fine:
        picture += fine_part(facts, np.random.default_rng((*seed, 1)), size, low)
    picture += np.random.default_rng((*seed, 2)).uniform(-NOISE, NOISE, picture.shape)
    return np.ascontiguousarray(np.rint(picture).astype(np.uint8).transpose(1, 2, 0))


# ----------------------------------------------------------------------------------------------------------------------
# visible in every view


def coarse_part(facts: Facts, rng: np.random.Generator, size: int) -> np.ndarray:
    """float64[3, size, size] in grey levels: stripes, a big shape, a box beside it, and discs in the corners."""
    y, x = _grid(size, size / SIDE)
    nx, ny = ACROSS[facts["stripes"]]
    frequency = 2 * np.pi / rng.uniform(15, 19) / np.hypot(nx, ny)
    phase = rng.uniform(0, 2 * np.pi)
    picture = np.empty((3, size, size))
    picture[:] = GREY + 12 * np.sin(frequency * (nx * x + ny * y) + phase)

    cx, cy = rng.uniform(30, 34, 2)
    color = GREY + np.array(COLORS[facts["color"]]) + rng.uniform(-6, 6, 3)
    _paint(picture, facts["shape"], (cx, cy), 11.5, color, {"sharp": 1.0, "blurred": 12.0}[facts["edge"]])

    dx, dy = STEPS[facts["box"]]
    aside = rng.uniform(-4, 4)
    _paint(picture, "square", (cx + 22 * dx + aside * abs(dy), cy + 22 * dy + aside * abs(dx)), 4.5, BLACK)

    order, shifts = rng.permutation(4), rng.uniform(-2.5, 2.5, (4, 2))
    for corner in order[: int(facts["discs"])]:
        _paint(picture, "circle", CORNERS[corner] + shifts[corner], 4, WHITE)
    return picture


def _paint(picture: np.ndarray, shape: str, center: tuple, radius: float, color: np.ndarray, edge: float = 1.0) -> None:
    """Paints a shape into the picture, with an edge of width `edge`."""
    size = picture.shape[-1]
    scale, reach = size / SIDE, 1.1 * radius + edge / 2
    columns, rows = (
        slice(max(0, int((middle - reach) * scale)), min(size, int((middle + reach) * scale) + 1)) for middle in center
    )
    y, x = _grid(size, scale)
    distance = _shape(shape, x[rows, columns] - center[0], y[rows, columns] - center[1], radius)
    part = picture[:, rows, columns]
    part += np.clip(0.5 - distance / edge, 0, 1) * (color[:, None, None] - part)


def _shape(name: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance to the edge of a shape at the origin, negative inside."""
    if name == "circle":
        return np.hypot(x, y) - r
    if name == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * r
    if name == "triangle":
        return np.maximum(0.87 * abs(x) - 0.5 * y - 0.55 * r, y - 0.8 * r)
    return np.maximum(np.minimum(abs(x), abs(y)) - 0.35 * r, np.maximum(abs(x), abs(y)) - 1.05 * r)  # cross


# ----------------------------------------------------------------------------------------------------------------------
# visible only in the hi-res crops


def fine_part(facts: Facts, rng: np.random.Generator, size: int, low: int) -> np.ndarray:
    """float64[3, size, size] in grey levels, whose bicubic low x low view is 0.

    From top to bottom: marks, three patches, a letter and a digit.
    """
    scale = size / (2 * low)  # picture pixels per hi-res pixel
    side = int(SIDE * scale)
    left, top = rng.integers(0, size - side + 1, 2)
    panel = np.zeros((3, side, side))

    def add(signal: np.ndarray, x: int, y: int, shift: np.ndarray, color: tuple[int, ...] = (1, 1, 1)) -> None:
        row, column = int((y + shift[0]) * scale), int((x + shift[1]) * scale)
        for channel, strength in zip(panel, color, strict=True):
            if strength:
                channel[row : row + len(signal), column : column + len(signal[0])] += strength * signal

    shifts = rng.integers(-SHIFT, SHIFT + 1, (9, 2))
    for slot in rng.permutation(4)[: int(facts["marks"])]:
        add(-1.2 * _mark(scale), 5 + 16 * slot, 7, shifts[slot])

    add(_lines(facts["lines"], rng, scale), 3, 24, shifts[4])
    add(_grain(facts["grain"], rng, scale), 24, 24, shifts[5])
    add(1.7 * _dots(rng, scale), 45, 24, shifts[6], DOTS[facts["dots"]])

    letter, digit = facts["letter"], "2357"[rng.integers(4)]
    left_one, right_one = (letter, digit) if facts["order"] == "left" else (digit, letter)
    add(1.4 * _glyph(left_one, scale), 13, 45, shifts[7])
    add(1.4 * _glyph(right_one, scale), 35, 45, shifts[8])
    return FINE * _invisible(panel, left, top, size, low)


@functools.lru_cache(maxsize=8)
def _seen(size: int, low: int) -> np.ndarray:
    """float64[size, size]: projection onto what Pillow's bicubic size -> low passes, along one axis."""
    eye = Image.fromarray(np.eye(size, dtype=np.float32))
    down = np.asarray(eye.resize((size, low), Image.Resampling.BICUBIC), np.float64)
    return np.linalg.pinv(down) @ down


def _invisible(panel: np.ndarray, left: int, top: int, size: int, low: int) -> np.ndarray:
    """The panel at its place in a picture, minus what the low-res view would show of it: x - P x P.

    A zero mean would not be enough, because the rim of a patch would remain visible.
    """
    side = panel.shape[-1]
    seen = _seen(size, low)
    whole = -(seen[:, top : top + side] @ panel @ seen[left : left + side])
    whole[:, top : top + side, left : left + side] += panel
    return whole


@functools.lru_cache(maxsize=64)
def _glyph(character: str, scale: float) -> np.ndarray:
    """float64[16 * scale, 16 * scale] in 0..1: a character of DejaVu Sans, 12 hi-res pixels high."""
    import matplotlib  # ships the font

    file = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    side, finer = int(16 * scale), 8
    image = Image.new("L", (side * finer, side * finer))
    font = ImageFont.truetype(file, round(16 * scale * finer))
    ImageDraw.Draw(image).text((side * finer / 2, side * finer / 2), character, fill=255, font=font, anchor="mm")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float64) / 255


@functools.lru_cache(maxsize=8)
def _mark(scale: float) -> np.ndarray:
    """A + of 7 x 7 hi-res pixels."""
    y, x = _grid(int(7 * scale), scale)
    return (np.minimum(abs(x - 3.5), abs(y - 3.5)) < 0.5) * 1.0


def _lines(direction: str, rng: np.random.Generator, scale: float) -> np.ndarray:
    y, x = _grid(int(PATCH * scale), scale)
    nx, ny = ACROSS[direction]
    return np.cos(2 * np.pi / 3 * (nx * x + ny * y) + rng.uniform(0, 2 * np.pi))


def _grain(kind: str, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Checks, or random specks; both have about the same contrast."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    specks = rng.permutation(PATCH * PATCH).reshape(PATCH, PATCH) % 2 * 2.0 - 1
    if kind == "specks":
        return 0.6 * _enlarge(specks, scale)
    y, x = _grid(int(PATCH * scale), scale)
    return np.cos(2 * np.pi / 3 * x + phase[0]) * np.cos(2 * np.pi / 3 * y + phase[1])


def _dots(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Dots of one hi-res pixel each, on a slightly irregular 5 x 5 grid."""
    cells = np.zeros((PATCH, PATCH))
    rows, columns = np.divmod(np.arange(25), 5)
    cells[3 * rows + rng.integers(0, 2, 25), 3 * columns + rng.integers(0, 2, 25)] = 1
    return _enlarge(cells, scale)


def _enlarge(cells: np.ndarray, scale: float) -> np.ndarray:
    """Enlarges an array of hi-res pixels to picture pixels."""
    line = _grid(int(len(cells) * scale), scale)[0][:, 0].astype(int)
    return cells[np.ix_(line, line)]


@functools.lru_cache(maxsize=32)
def _grid(side: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """y and x of pixel centres, float64[side, side] each, in units of `scale` pixels."""
    line = (np.arange(side) + 0.5) / scale
    y, x = np.meshgrid(line, line, indexing="ij")
    return y, x
