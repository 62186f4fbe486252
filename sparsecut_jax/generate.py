"""Asks a trained run about an image, and prints the answer.

    python -m sparsecut_jax.generate --workdir=runs/base --image=picture.png --prompt="what color is the shape?"

Without --image the question is text only; --image may be given several times, up to config.data.max_images.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from absl import flags

from sparsecut_jax import cli, sharding
from sparsecut_jax.checks import nearest
from sparsecut_jax.data import images
from sparsecut_jax.data.conversation import encode_prompt
from sparsecut_jax.data.templates import OWN, TEMPLATES, get_template, stop_ids
from sparsecut_jax.inference.decoding import encode_images, generate, pad_prompts, until
from sparsecut_jax.inference.run import Run, load_run
from sparsecut_jax.types import UserError

FLAGS = flags.FLAGS


def answer(
    run: Run,
    prompt: str,
    paths: list[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    template: str = "",
) -> str:
    """The model's answer to a prompt about the images at `paths`, asked in the run's template or another one.

    Raises:
      UserError: a file that is no image, more images than the model has slots, or a template that does not go with the
        tokenizer.
    """
    cfg = run.config
    slots = cfg.data.max_images
    if len(paths) > slots:
        raise UserError(f"{len(paths)} images given, but the run was trained with config.data.max_images={slots}")
    written = get_template(template or run.template, run.tokenizer)
    stop = stop_ids(run.tokenizer, written)
    example = encode_prompt(prompt, len(paths), run.tokenizer, written, cfg.tokens_per_image)
    rows = sharding.data_parallel(run.mesh)  # the prompt, and empty ones for the other devices
    views = np.zeros((rows, slots, *run.pictures.shape), np.uint8)
    for m, path in enumerate(paths):
        views[0, m] = run.pictures.views(images.read_image(path, cfg.data.max_pixels))
    with jax.set_mesh(run.mesh):
        views, *arrays = jax.device_put(
            (views, *pad_prompts([example], rows, slots)), sharding.batch_sharding(run.mesh)
        )
        encoded = encode_images(run.model, run.params, views)
        ids, _ = generate(
            run.model,
            run.params,
            *arrays,
            encoded,
            max_new_tokens,
            np.array(stop),
            temperature,
            jax.random.key(seed),
        )
    return run.tokenizer.decode(until(np.asarray(ids)[0], stop)).strip()


def main() -> None:
    if not FLAGS.workdir:
        raise UserError("--workdir is missing; for example --workdir=runs/base")
    if not FLAGS.prompt:
        raise UserError('--prompt is missing; for example --prompt="what color is the shape?"')
    if not 1 <= FLAGS.max_new_tokens <= 100_000:
        raise UserError(f"--max_new_tokens={FLAGS.max_new_tokens}: expected 1 to 100,000")
    if not 0 <= FLAGS.temperature < math.inf:
        raise UserError(f"--temperature={FLAGS.temperature}: expected 0 or more")
    if not 0 <= FLAGS.seed < 2**32:
        raise UserError(f"--seed={FLAGS.seed}: expected 0 to below 2^32")
    known = [*TEMPLATES, OWN]
    if FLAGS.template and FLAGS.template not in known:
        near = nearest(FLAGS.template, known)
        raise UserError(f"--template={FLAGS.template!r} is not known{near}; known: {', '.join(known)}")
    run = load_run(FLAGS.workdir, FLAGS.checkpoint)
    how = (FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.seed, FLAGS.template)
    print(answer(run, FLAGS.prompt, FLAGS.image, *how))


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    flags.DEFINE_string("workdir", "", "Workdir of a run.")
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step.")
    flags.DEFINE_multi_string("image", [], "Picture to ask about; may be repeated.")
    flags.DEFINE_string("prompt", "", "The question; <image> in it says where an image goes (default: in front).")
    flags.DEFINE_integer("max_new_tokens", 64, "Longest answer, in tokens.")
    flags.DEFINE_float("temperature", 0.0, "0: the likeliest answer; above: sampled.")
    flags.DEFINE_string("template", "", "How the prompt is written; left out: as the run was trained.")
    flags.DEFINE_integer("seed", 0, "Of the sampling.")
    cli.run(main, __doc__)


if __name__ == "__main__":
    run()
