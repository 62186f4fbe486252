"""The Python API (docs/api.md): load a trained model and ask it questions."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence

from sparsecut_jax.inference.answering import Picture, check_asked, reply
from sparsecut_jax.runs.joined import load_whole
from sparsecut_jax.runs.run import Run, load_run
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its parameters on the devices of this machine."""

    run: Run

    @property
    def config(self) -> Config:
        """Every setting, as the run resolved it."""
        return self.run.config

    def answer(
        self,
        prompt: str,
        images: Picture | Sequence[Picture] = (),
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        template: str = "",
    ) -> str:
        """The answer to a prompt with any number of images.

        Args:
          prompt: `<image>` marks where an image goes; images without a mark go in front.
          images: paths, bytes of image files, PIL images or arrays uint8[H, W, 3].
          temperature: 0 takes the most likely token; above 0, tokens are sampled with `seed`.
          template: prompt template; "": the one used in training.

        Raises:
          UserError: an image that cannot be read, more images than the model takes, or arguments out of range.
        """
        check_asked(max_new_tokens, temperature, seed, template)
        several = isinstance(images, Sequence) and not isinstance(images, Picture | bytearray)
        pictures = images if several else [images]
        return reply(self.run, prompt, pictures, max_new_tokens, temperature, seed, template).text


def load(path: str | os.PathLike, checkpoint: str = "latest") -> Model:
    """A model from the workdir of a run, or from a folder in the layout of `convert to-hf` or llava-hf.

    checkpoint: for a workdir, "latest", "best" or a step.

    Raises:
      UserError: `path` holds no model, or the model cannot be read.
    """
    path, checkpoint = os.fspath(path), str(checkpoint)
    if not os.path.isdir(path):
        raise UserError(f"{path} is not a folder; expected the workdir of a run, or a folder written by convert to-hf")
    is_workdir = os.path.isdir(os.path.join(path, "checkpoints"))
    if not is_workdir and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{path} has neither checkpoints/ (the workdir of a run) nor config.json (an exported model)")
    if not is_workdir and checkpoint != "latest":
        raise UserError(f"{path} is an exported model and has no checkpoint {checkpoint!r}; leave `checkpoint` out")
    with _without_warnings():
        return Model(load_run(path, checkpoint) if is_workdir else load_whole(path))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that what is opened to be read cannot be written to, transformers that PyTorch is not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
