"""Answers one prompt about images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparsecut_jax.data import images
from sparsecut_jax.inference.engine import Answer, Engine, Request
from sparsecut_jax.runs.run import Run
from sparsecut_jax.text.templates import OWN, TEMPLATES
from sparsecut_jax.types import UserError, nearest

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray


def reply(
    run: Run,
    prompt: str,
    pictures: Sequence[Picture],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    template: str = "",
) -> Answer:
    """The model's answer to a prompt about pictures, asked in the run's template or another one.

    pictures: paths, the bytes of image files, PIL images or arrays uint8[H, W, 3].

    Raises:
      UserError: a file that is not an image, more images than the model has slots, or a template that the tokenizer does
        not support.
    """
    check_local(pictures)
    if not isinstance(prompt, str):
        raise UserError(f"the prompt is a {type(prompt).__name__}; expected a string")
    cfg = run.config
    slots = cfg.data.max_images
    if len(pictures) > slots:
        raise UserError(f"{len(pictures)} images given, but the model was trained with config.data.max_images={slots}")
    engine = Engine(run, template)
    example, views = engine.prompt(prompt, len(pictures)), engine.no_pictures()
    read = [run.pictures.views(opened(picture, cfg.data.max_pixels)) for picture in pictures]
    if read and 0 in engine.here:
        views[0, : len(read)] = read
    (answer,) = engine.answers(views, [Request(example)], max_new_tokens, temperature, seed)
    return answer


def check_local(pictures: Sequence[Picture]) -> None:
    """Raises UserError for a URL among them: nothing is downloaded but from a bucket, gs://..."""
    for picture in pictures:
        if isinstance(picture, str) and "://" in picture and not picture.startswith("gs://"):
            name = os.path.basename(picture) or "picture.png"
            how = f": curl -LO {picture}" if picture.startswith(("http://", "https://")) else ""
            raise UserError(f"image {picture} is a URL; download it, then name the file {name}{how}")


def check_asked(max_new_tokens: int, temperature: float, seed: int, template: str, dashes: str = "") -> None:
    """Raises UserError if an argument of `reply` is invalid; `dashes` precede its name in the message."""
    if not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens <= 100_000:
        raise UserError(f"{dashes}max_new_tokens={max_new_tokens}: expected 1 to 100,000")
    if not 0 <= temperature < math.inf:
        raise UserError(f"{dashes}temperature={temperature}: expected 0 or more")
    if not 0 <= seed < 2**32:
        raise UserError(f"{dashes}seed={seed}: expected 0 to below 2^32")
    check_template(template, dashes)


def check_template(template: str, dashes: str = "") -> None:
    """Raises UserError if `template` is neither "" nor the name of a template."""
    known = [*TEMPLATES, OWN]
    if template and template not in known:
        near = nearest(template, known)
        raise UserError(f"{dashes}template={template!r} is not known{near}; known: {', '.join(known)}")


def opened(picture: Picture, max_pixels: int) -> Image.Image:
    """RGB image of a picture. Raises UserError if it is not an image or has more than `max_pixels`."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UserError(f"an image is {picture.dtype}{list(picture.shape)}; expected uint8[height, width, 3]")
        picture = Image.fromarray(picture)
    elif not isinstance(picture, (str, os.PathLike, bytes, Image.Image)):
        kind = type(picture).__name__
        raise UserError(
            f"an image is a {kind}; expected a path, bytes, a PIL image or an array uint8[height, width, 3]"
        )
    return images.read_image(picture, max_pixels)
