"""Answers a question about images with a trained model.

    python -m sparsecut_jax.generate --workdir=runs/base --image=picture.png --prompt="what color is the shape?"

Only the answer is printed on stdout; notes, such as an answer that was cut or a fusion that was never trained, go to stderr.
Without --image the question is text only; --image may be given several times, up to config.data.max_images.
"""

from __future__ import annotations

import contextlib
import sys

from absl import flags

from sparsecut_jax.commandline import cli
from sparsecut_jax.inference.answering import check_asked, check_local, reply
from sparsecut_jax.inference.engine import Answer
from sparsecut_jax.runs.run import FRESH_FUSION, Run, load_run
from sparsecut_jax.runtime.progress import busy

FLAGS = flags.FLAGS


def main() -> None:
    cli.need("--workdir=runs/base", "--prompt=what color is the shape?")
    check_local(FLAGS.image)
    check_asked(FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.seed, FLAGS.template, dashes="--")
    run = load_run(FLAGS.workdir, FLAGS.checkpoint)
    how = (FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.seed, FLAGS.template)
    # The seconds are shown on a terminal only: a script gets the answer alone.
    with busy("compiling and answering", sys.stderr) if sys.stderr.isatty() else contextlib.nullcontext():
        answer = reply(run, FLAGS.prompt, FLAGS.image, *how)
    print(answer.text, flush=True)
    for note in notes(run, bool(FLAGS.image), answer, FLAGS.max_new_tokens):
        print(f"note: {note}", file=sys.stderr)


def notes(run: Run, image: bool, answer: Answer, max_new_tokens: int) -> list[str]:
    """Notes about an answer; `image`: whether the question is about an image."""
    said = []
    if image and run.fresh_fusion:
        said.append(FRESH_FUSION.format(run.workdir))
    if answer.cut:
        said.append(f"the answer was cut at --max_new_tokens={max_new_tokens}")
    elif not answer.text:
        said.append("the answer is empty: the model ended it at once")
    return said


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    flags.DEFINE_string("workdir", "", "Workdir of a run.")
    flags.DEFINE_string("checkpoint", "latest", "Checkpoint: latest, best or a step.")
    flags.DEFINE_multi_string("image", [], "Image to ask about.")
    flags.DEFINE_string("prompt", "", "The question; <image> marks where an image goes (default: in front).")
    flags.DEFINE_integer("max_new_tokens", 64, "Maximum answer length in tokens.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token; above 0, tokens are sampled.")
    flags.DEFINE_string("template", "", "Prompt template; default: the one the run was trained with.")
    flags.DEFINE_integer("seed", 0, "Random seed for sampling.")
    cli.run(main, __doc__)


if __name__ == "__main__":
    run()
