"""`data preview`: draws the first sequences of a stage, with views and tokens as the model gets them."""

from __future__ import annotations

import dataclasses
import os
import re

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from sparsecut_jax.data.batch_plan import BatchPlan
from sparsecut_jax.data.glyphs import Run, draw_runs, label, runs_of
from sparsecut_jax.data.images import canvas
from sparsecut_jax.data.pipeline import BatchReader, Reader
from sparsecut_jax.data.walk import stage_plan, walk
from sparsecut_jax.models import ways
from sparsecut_jax.settings import Config
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import Batch, shown

WIDTH, SIDE, MARGIN, LINE = 1200, 160, 10, 20
COLORS = {"prompt": "#dddddd", "target": "#9fdf9f", "image": "#9fc5ef"}
ROW, BRANCH = "#cc3311", "#ee9900"  # marks where another row, or another independent question of the same row, begins


@dataclasses.dataclass(frozen=True)
class Word:
    """A box on the page: a token, several tokens that form text only together, or an image.

    edge: colour of the mark in front of it, "" for none.
    """

    runs: tuple[Run, ...]
    color: str
    edge: str = ""

    @property
    def width(self) -> int:
        return sum(run.width for run in self.runs) + 4


def preview(reader: Reader, cfg: Config, name: str, count: int) -> None:
    """Draws the first `count` sequences of stage `name` into data_preview.png."""
    walked = walk(reader.split, reader.encode)
    plan = stage_plan(name, walked, reader.split, cfg.stages[name], cfg)
    sheets = _sheets(reader, plan, cfg, count)
    height = sum(sheet.height + MARGIN for sheet in sheets) + 2 * LINE + MARGIN
    page = Image.new("RGB", (WIDTH + 2 * MARGIN, height), "white")
    draw, x = ImageDraw.Draw(page), MARGIN
    for word in _legend():
        x = _draw_word(draw, x, MARGIN, word) + MARGIN
    y = MARGIN + 2 * LINE
    for sheet in sheets:
        page.paste(sheet, (MARGIN, y))
        y += sheet.height + MARGIN
    path = os.path.join(cfg.workdir, "data_preview.png")
    page.save(path)
    print(f"{len(sheets)} sequences of stage {name}: {path}")


def _legend() -> list[Word]:
    return [
        Word(runs_of("prompt"), COLORS["prompt"]),
        Word(runs_of("target"), COLORS["target"]),
        Word(runs_of("image"), COLORS["image"]),
        Word(runs_of("a new row in the same sequence"), "white", ROW),
        Word(runs_of("a question that sees only the image and itself"), "white", BRANCH),
        Word((label("x3"), *runs_of(" text of 3 tokens")), "white"),
        Word((label("U+1F9E0"), *runs_of(" a character that no installed font has")), "white"),
    ]


def _sheets(reader: Reader, plan: BatchPlan, cfg: Config, count: int) -> list[Image.Image]:
    read = BatchReader(reader, plan, (cfg.seed, 0), np.arange(plan.batch_size))
    sheets: list[Image.Image] = []
    for number in range(len(plan)):
        batch, bad = read(number)
        for item in bad:
            print(f"left out: {shown(item.reason)}")
        for i in range(min(plan.batch_size, count - len(sheets))):
            sheets.append(_sheet(batch, i, reader, ways.positions(cfg)))
        if len(sheets) >= count:
            break
    return sheets


def _sheet(batch: Batch, i: int, reader: Reader, image_tokens: int) -> Image.Image:
    """One sequence: its images, each low-res view beside its assembled crops, and its tokens below."""
    groups = [
        _group(views, reader.pictures.grid)
        for views, start in zip(batch.views[i], batch.image_start[i].tolist(), strict=True)
        if start >= 0
    ]
    pictures, words = _lines(groups), _lines(_words(batch, i, reader, image_tokens), gap=1)
    height = len(pictures) * (SIDE + MARGIN) + len(words) * LINE + MARGIN
    sheet = Image.new("RGB", (WIDTH, height), "#f7f7f7")
    draw, y = ImageDraw.Draw(sheet), 0
    for line in pictures:
        for x, group in line:
            sheet.paste(group, (x, y))
        y += SIDE + MARGIN
    for line in words:
        for x, word in line:
            _draw_word(draw, x, y, word)
        y += LINE
    return sheet


def _group(views: np.ndarray, grid: tuple[int, ...]) -> Image.Image:
    """Low-res view and crops, uint8[V, S, S, 3], side by side: SIDE high, and no wider than the page."""
    room = (WIDTH - SIDE - MARGIN, SIDE)
    pair = [views[0], canvas(views[1:], grid)] if len(views) > 1 else [views[0]]
    pictures = [ImageOps.contain(Image.fromarray(view), room) for view in pair]
    width = sum(picture.width for picture in pictures) + MARGIN * (len(pictures) - 1)
    group, x = Image.new("RGB", (width, SIDE), "#f7f7f7"), 0
    for picture in pictures:
        group.paste(picture, (x, 0))
        x += picture.width + MARGIN
    return group


def _words(batch: Batch, i: int, reader: Reader, image_tokens: int) -> list[Word]:
    """The tokens of sequence i as words; an image is one word."""
    starts = batch.image_start[i][batch.image_start[i] >= 0].tolist()
    branches = np.zeros_like(batch.segments) if batch.branches is None else batch.branches
    words, at, segment, branch = [], 0, 1, 0
    pieces: list[tuple[int, str, str]] = []  # tokens since the last image: id, colour, edge
    while at < batch.tokens.shape[1] and batch.segments[i, at]:
        new_row, new_branch = batch.segments[i, at] != segment, branches[i, at] != branch
        edge = ROW if new_row else BRANCH if new_branch else ""
        segment, branch = batch.segments[i, at], branches[i, at]
        if at in starts:
            starts.remove(at)  # an image may take no position
            words += token_words(reader.encode.tokenizer, pieces)
            words.append(Word(runs_of(f"image, {image_tokens} tokens"), COLORS["image"], edge))
            pieces, at = [], at + image_tokens
            continue
        pieces.append((int(batch.tokens[i, at]), COLORS["target" if batch.loss_mask[i, at] else "prompt"], edge))
        at += 1
    return words + token_words(reader.encode.tokenizer, pieces)


def token_words(tokenizer: Tokenizer, tokens: list[tuple[int, str, str]]) -> list[Word]:
    """(id, colour, edge) of successive tokens as words.

    Tokens that hold parts of characters are joined until their bytes are text; "x3" says that three are. Bytes that stay
    incomplete are shown as labels, such as E4 BD.
    """
    words: list[Word] = []
    held, count, color, edge = b"", 0, "", ""

    def release() -> None:
        nonlocal held, count
        if held:
            words.append(Word((label(held.hex(" ").upper()),), color, edge))
        held, count = b"", 0

    for token, its_color, its_edge in tokens:
        text = tokenizer.decode([token]) or tokenizer.backend.id_to_token(token) or f"[{token}]"
        part = token_bytes(tokenizer.backend.id_to_token(token) or "") if "\ufffd" in text else None
        if part is None or its_edge or its_color != color:
            release()
        if part is None:
            words += _split(text, its_color, its_edge)
            continue
        if not held:
            color, edge = its_color, its_edge
        held, count = held + part, count + 1
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":  # no continuation can make it text
                release()
            continue
        mark = (label(f"x{count}"),) if count > 1 else ()
        words.append(Word((*runs_of(_visible(text)), *mark), color, edge))
        held, count = b"", 0
    release()
    return words


def token_bytes(name: str) -> bytes | None:
    """The bytes of a token by its name in a byte-level vocabulary, or of sentencepiece's <0xE4>; None for other names."""
    if found := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(found[1])
    table = _byte_level()
    return bytes(table[c] for c in name) if name and set(name) <= set(table) else None


def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: itself where it can be printed, others from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "·")


def _split(text: str, color: str, edge: str) -> list[Word]:
    """A token as one word, or as several if it is wider than the page."""
    word = Word(runs_of(_visible(text)), color, edge)
    if word.width < WIDTH or len(text) < 2:
        return [word]
    half = len(text) // 2
    return _split(text[:half], color, edge) + _split(text[half:], color, "")


def _lines(boxes: list, gap: int = MARGIN) -> list[list[tuple]]:
    """Breaks things with a width into lines of the page's width: (x, thing)."""
    lines, x = [], WIDTH
    for box in boxes:
        if x + box.width > WIDTH:
            lines.append([])
            x = 0
        lines[-1].append((x, box))
        x += box.width + gap
    return lines


def _draw_word(draw: ImageDraw.ImageDraw, x: int, y: int, word: Word) -> int:
    """Draws a word; returns where it ends."""
    end = x + word.width
    draw.rectangle((x, y, end - 1, y + LINE - 3), fill=word.color)
    draw_runs(draw, x + 2, y + 1, word.runs)
    if word.edge:
        draw.line((x, y, x, y + LINE - 3), fill=word.edge, width=3)
    return end
