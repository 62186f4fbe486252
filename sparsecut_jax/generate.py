"""Asks a trained run about an image, and prints the answer.

    python -m sparsecut_jax.generate --workdir=runs/base --image=picture.png --prompt="what color is the shape?"

stdout is the answer alone; whether it was cut, is empty, or comes from a fusion that was never trained stands on stderr.
Without --image the question is text only; --image may be given several times, up to config.data.max_images.
"""

from __future__ import annotations

import contextlib
import sys

from absl import flags

from sparsecut_jax import cli
from sparsecut_jax.inference.answering import Reply, check_asked, check_local, reply
from sparsecut_jax.inference.run import FRESH_FUSION, Run, load_run
from sparsecut_jax.training.report import busy

FLAGS = flags.FLAGS


def main() -> None:
    cli.need("--workdir=runs/base", "--prompt=what color is the shape?")
    check_local(FLAGS.image)
    check_asked(FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.seed, FLAGS.template, dashes="--")
    run = load_run(FLAGS.workdir, FLAGS.checkpoint)
    how = (FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.seed, FLAGS.template)
    # Only a person sees the seconds counted: a script gets the answer alone.
    with busy("compiling and answering", sys.stderr) if sys.stderr.isatty() else contextlib.nullcontext():
        found = reply(run, FLAGS.prompt, FLAGS.image, *how)
    print(found.text, flush=True)
    for note in notes(run, bool(FLAGS.image), found, FLAGS.max_new_tokens):
        print(f"note: {note}", file=sys.stderr)


def notes(run: Run, image: bool, found: Reply, max_new_tokens: int) -> list[str]:
    """What to know about an answer beside its text; an image was asked about or not."""
    said = []
    if image and run.fresh_fusion:
        said.append(FRESH_FUSION.format(run.workdir))
    if found.cut:
        said.append(f"the answer was cut at --max_new_tokens={max_new_tokens}")
    elif not found.text:
        said.append("the answer is empty: the model ended it at once")
    return said


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
