"""Draws text of any script on a Pillow image, with the installed fonts.

A character that no font has is drawn as its code point, such as U+1F9E0, never as an empty box. The same
applies to control characters and others that would be invisible.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import unicodedata

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

SIZE, SMALL = 13, 9  # pixels, of text and of labels
TEXT, LABEL = "black", "#884400"
PLAIN = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
STYLED = re.compile("bold|italic|oblique|light|thin|black|medium|cond|mono|serif", re.IGNORECASE)
BLANKS = re.compile("lastresort|adobeblank", re.IGNORECASE)  # fonts with a box, or nothing, for every character


@dataclasses.dataclass(frozen=True)
class Run:
    """Characters that are drawn with one font; a label if `small`."""

    text: str
    path: str
    small: bool = False

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        return _font(self.path, SMALL if self.small else SIZE)

    @property
    def width(self) -> int:
        return round(self.font.getlength(self.text)) + 2 * self.small


def label(text: str) -> Run:
    """`text` in small letters, as a label."""
    return Run(text, PLAIN, small=True)


@functools.lru_cache(maxsize=100_000)
def runs_of(text: str) -> tuple[Run, ...]:
    """The text as pieces with one font each; a combining mark stays with the character before it if its font has both."""
    runs: list[Run] = []
    for character in text:
        last = runs[-1] if runs and not runs[-1].small else None
        if last and unicodedata.combining(character) and ord(character) in _characters(last.path):
            path = last.path
        else:
            path = font_of(character)
        if not path:
            runs.append(label(f"U+{ord(character):04X}"))
        elif last and last.path == path:
            runs[-1] = Run(last.text + character, path)
        else:
            runs.append(Run(character, path))
    return tuple(runs)


@functools.lru_cache(maxsize=100_000)
def font_of(character: str) -> str:
    """The first installed font in which the character is visible, trying DejaVu Sans first; "" for none."""
    if character == " ":
        return PLAIN
    if unicodedata.category(character)[0] in "CZ":
        return ""
    for path in _fonts():
        # Colour fonts map characters to pictures that Pillow does not draw at this size.
        if ord(character) in _characters(path) and _font(path, SIZE).getmask(character).getbbox():
            return path
    return ""


def draw_runs(draw: ImageDraw.ImageDraw, x: int, y: int, runs: tuple[Run, ...]) -> None:
    """Draws the runs side by side from (x, y), their upper left corner; all share a baseline."""
    base = y + _font(PLAIN, SIZE).getmetrics()[0]
    for run in runs:
        draw.text((x + run.small, base), run.text, fill=LABEL if run.small else TEXT, font=run.font, anchor="ls")
        x += run.width


@functools.cache
def _fonts() -> tuple[str, ...]:
    """Font files, regular ones first; searched by each process, since matplotlib's list is cached."""
    fonts = [path for path in font_manager.findSystemFonts() if not BLANKS.search(os.path.basename(path))]
    plain = lambda path: (bool(STYLED.search(os.path.basename(path))), os.path.basename(path), path)
    return (PLAIN, *sorted(fonts, key=plain))


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """Code points that the font has glyphs for; none if it cannot be read or has only bitmaps of one size."""
    try:
        face = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(face.get_charmap()) if face.scalable else frozenset()


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)
