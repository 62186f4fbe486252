"""`data preview`: the first sequences of a stage as a picture, views and tokens as the model gets them."""

from __future__ import annotations

import os

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsecut_jax.cli import shown
from sparsecut_jax.data.pipeline import BatchReader, Reader
from sparsecut_jax.data.plan import Plan
from sparsecut_jax.data.walk import stage_plan, walk
from sparsecut_jax.settings import Config
from sparsecut_jax.types import Batch

WIDTH, SIDE, MARGIN, LINE = 1200, 160, 10, 20
COLORS = {"prompt": "#dddddd", "answer": "#9fdf9f", "image": "#9fc5ef"}
ROW, BRANCH = "#cc3311", "#ee9900"  # marks where another row, or another independent question of the same row, begins


def preview(reader: Reader, cfg: Config, name: str, count: int) -> None:
    """Draws the first `count` sequences of stage `name` into data_preview.png."""
    walked = walk(reader.split, reader.encode)
    plan = stage_plan(name, walked, reader.split, cfg.stages[name], cfg)
    sheets = _sheets(reader, plan, cfg, count)
    height = sum(sheet.height + MARGIN for sheet in sheets) + 2 * LINE + MARGIN
    page = Image.new("RGB", (WIDTH + 2 * MARGIN, height), "white")
    draw, font = ImageDraw.Draw(page), _font()
    at = MARGIN
    for label, color in (("prompt", "prompt"), ("to be predicted", "answer"), ("image", "image")):
        at = _word(draw, at, MARGIN, label, COLORS[color], font) + MARGIN
    at = _word(draw, at, MARGIN, "a new row in the same sequence", "white", font, ROW) + MARGIN
    _word(draw, at, MARGIN, "a question that sees only the image and itself", "white", font, BRANCH)
    y = MARGIN + 2 * LINE
    for sheet in sheets:
        page.paste(sheet, (MARGIN, y))
        y += sheet.height + MARGIN
    path = os.path.join(cfg.workdir, "data_preview.png")
    page.save(path)
    print(f"{len(sheets)} sequences of stage {name}: {path}")


def _sheets(reader: Reader, plan: Plan, cfg: Config, count: int) -> list[Image.Image]:
    read = BatchReader(reader, plan, (cfg.seed, 0), np.arange(plan.batch_size))
    sheets: list[Image.Image] = []
    for number in range(len(plan)):
        batch, bad = read(number)
        for item in bad:
            print(f"left out: {shown(item.reason)}")
        for i in range(min(plan.batch_size, count - len(sheets))):
            sheets.append(_sheet(batch, i, reader, cfg.tokens_per_image))
        if len(sheets) >= count:
            break
    return sheets


def _sheet(batch: Batch, i: int, reader: Reader, image_tokens: int) -> Image.Image:
    """One sequence: its pictures, each low-res view beside its crops put together, and its tokens below."""
    pictures = []
    for views, start in zip(batch.views[i], batch.image_start[i].tolist(), strict=True):
        if start >= 0:
            pictures += [Image.fromarray(view) for view in (views[0], *_canvas(views, reader.pictures.grid))]
    pictures = [picture.resize((round(SIDE * picture.width / picture.height), SIDE)) for picture in pictures]
    font, lines = _font(), _layout(_words(batch, i, reader, image_tokens), _font())
    sheet = Image.new("RGB", (WIDTH, (SIDE + MARGIN if pictures else 0) + len(lines) * LINE + MARGIN), "#f7f7f7")
    draw, x = ImageDraw.Draw(sheet), 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + MARGIN
    y = SIDE + MARGIN if pictures else 0
    for line in lines:
        for x, text, color, edge in line:
            _word(draw, x, y, text, color, font, edge)
        y += LINE
    return sheet


def _canvas(views: np.ndarray, grid: tuple[int, ...]) -> list[np.ndarray]:
    """The crops put together again: [] where there are none."""
    if len(views) == 1:
        return []
    rows, columns, size = *grid, views.shape[1]
    canvas = views[1:].reshape(rows, columns, size, size, 3).swapaxes(1, 2)
    return [canvas.reshape(rows * size, columns * size, 3)]


def _words(batch: Batch, i: int, reader: Reader, image_tokens: int) -> list[tuple[str, str, str]]:
    """(text, colour, colour of the mark in front) of every token; an image is one."""
    tokenizer = reader.encode.tokenizer
    starts = set(batch.image_start[i][batch.image_start[i] >= 0].tolist())
    branches = np.zeros_like(batch.segments) if batch.branches is None else batch.branches
    words, at, segment, branch = [], 0, 1, 0
    while at < batch.tokens.shape[1] and batch.segments[i, at]:
        new_row, new_branch = batch.segments[i, at] != segment, branches[i, at] != branch
        edge = ROW if new_row else BRANCH if new_branch else ""
        segment, branch = batch.segments[i, at], branches[i, at]
        if at in starts:
            words.append((f"image, {image_tokens} positions", COLORS["image"], edge))
            at += image_tokens
            continue
        token = int(batch.tokens[i, at])
        text = tokenizer.decode([token]) or tokenizer.backend.id_to_token(token) or "?"
        color = COLORS["answer" if batch.loss_mask[i, at] else "prompt"]
        words.append((text.replace("\n", "⏎").replace(" ", "·"), color, edge))
        at += 1
    return words


def _layout(words: list[tuple[str, str, str]], font: ImageFont.FreeTypeFont) -> list[list[tuple]]:
    """Lines of (x, text, colour, edge)."""
    lines, x = [[]], 0
    for text, color, edge in words:
        width = round(font.getlength(text)) + 5
        if x + width > WIDTH and lines[-1]:
            lines.append([])
            x = 0
        lines[-1].append((x, text, color, edge))
        x += width
    return lines


def _word(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, color: str, font, edge: str = "") -> int:
    """Draws a token; returns where it ends."""
    end = x + round(font.getlength(text)) + 4
    draw.rectangle((x, y, end - 1, y + LINE - 3), fill=color)
    draw.text((x + 2, y + 1), text, fill="black", font=font)
    if edge:
        draw.line((x, y, x, y + LINE - 3), fill=edge, width=3)
    return end


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 13)
