"""Imports pretrained weights, and exports trained models in formats that other programs read.

    python -m sparsecut_jax.convert from-hf --vision=DIR --llm=DIR --config=configs/base.py --out=runs/joined
    python -m sparsecut_jax.convert from-hf --model=llava-hf/llava-1.5-7b-hf --out=runs/llava
    python -m sparsecut_jax.convert to-hf --workdir=runs/base --out=exported --verify

from-hf joins a vision tower, an LLM and, where --fusion names one, a projector into a workdir that evaluate, generate
and --config.init_from read. to-hf writes the model of a workdir as safetensors with config.json, tokenizer and image
processor: as `llava` if LLaVA can represent it (one view, no shortcuts), otherwise as `sparsecut`, which --model reads. A run
with LoRA is written with its adapters in the LLM (--merge), or as adapters and fusion alone (--as=adapter).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator

import jax
from absl import flags

from sparsecut_jax.commandline import cli
from sparsecut_jax.exporting import adapter, export, verify
from sparsecut_jax.runs.checkpoint import CONVERTED, Checkpoints, meta_of
from sparsecut_jax.runs.joined import as_written, join
from sparsecut_jax.runs.run import load_run
from sparsecut_jax.runs.workdir import write_run_files
from sparsecut_jax.settings import Config
from sparsecut_jax.training import report
from sparsecut_jax.types import UserError, nearest
from sparsecut_jax.weights import load
from sparsecut_jax.weights import pretrained as weights

FLAGS = flags.FLAGS
EXAMPLES = {
    "from-hf": ("--model=llava-hf/llava-1.5-7b-hf", "--out=runs/llava"),
    "to-hf": ("--workdir=runs/base", "--out=exported"),
}
COMMANDS = tuple(EXAMPLES)
WORDS_OF = dict.fromkeys(("config", "print_config", "model", *weights.PARTS, "tokenizer"), ("from-hf",))
WORDS_OF |= dict.fromkeys(("workdir", "checkpoint", "as", "drop_shortcuts", "merge", "verify"), ("to-hf",))


def from_hf(cfg: Config, out: str, prompt: bool = False) -> load.Report:
    """Joins the parts that config.init names and writes them to `out` as a workdir of step 0.

    prompt: whether a whole model's file decides the template of the last stage and data.max_images.

    Raises:
      UserError: nothing to convert, or weights that cannot be read or do not fit; nothing is written then.
    """
    joined = join(cfg)
    tokenizer, shaped, resolved = joined.tokenizer, joined.shaped, joined.config
    if prompt:
        resolved = as_written(resolved, joined.opened.weight_sources["llm"], tokenizer)
    with new_folder(out) as folder:
        params, came_from = joined.read()
        meta = {**meta_of(CONVERTED, cfg, resolved, tokenizer, data=""), "seconds": 0.0}
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            checkpoints.save_params(params, meta)
        write_run_files(folder, resolved, tokenizer, shaped.model.wiring)
    ids = f"{tokenizer.size:,} ids" if tokenizer else "none; give --tokenizer=DIR to ask questions"
    print(report.heading(shaped.mesh, shaped.model.wiring, shaped.abstract(), {}, resolved.param_dtype) + "\n")
    print("\n".join([*joined.opened.notes, str(came_from), f"tokenizer  {ids}"]))
    print(f"written to {out} as {resolved.param_dtype}; shortcuts.png shows its plan")
    return came_from


def to_hf(workdir: str, which: str, out: str, kind: str, drop_shortcuts: bool, merge: bool, check: bool) -> None:
    """Writes the model of a run to `out`; see exporting/export.py and adapter.py. Leaves nothing behind after an error.

    Raises:
      UserError: incompatible flags, or the format cannot represent the model.
    """
    if kind == "adapter" and (merge or check or drop_shortcuts):
        raise UserError("--as=adapter does not write a whole model; leave out --merge, --verify and --drop-shortcuts")
    with new_folder(out) as folder:
        run = load_run(workdir, which, text=False)
        with jax.set_mesh(run.mesh):
            run = adapter.merged(run) if merge else run
            if kind == "adapter":
                said = adapter.write_adapter(run, folder)
            else:
                said = export.write(run, folder, kind, drop_shortcuts)
            if check:
                said += "\n" + verify.verify(run, folder, drop_shortcuts)
    print(said)
    print(f"written to {out}:")
    for name in sorted(os.listdir(out)):
        print(f"  {os.path.getsize(os.path.join(out, name)):>14,} {name}")


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """A folder to write into, renamed to `path` at the end of the block; removed if the block fails.

    Raises:
      UserError: `path` already exists.
    """
    path = os.path.abspath(path)
    if os.path.isfile(path) or os.path.isdir(path) and os.listdir(path):
        raise UserError(f"--out={path} already exists; choose another name, or remove it")
    partial = f"{path}.partial-{os.getpid()}"
    os.makedirs(partial)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(command: str) -> None:
    if command not in COMMANDS:
        got = f"unknown command {command!r}{nearest(command, COMMANDS)}" if command else "no command given"
        reads, writes = (cli.shell_line(word, *args) for word, args in EXAMPLES.items())
        raise UserError(
            f"{got}; expected from-hf (reads weights, for example: {reads}) or to-hf (writes a run, for example: {writes}); "
            "--help explains both"
        )
    if command == "from-hf":
        given = {f"init.{part}": getattr(FLAGS, part) for part in ("model", *weights.PARTS)}
        given["tokenizer.path"] = FLAGS.tokenizer
        cfg = cli.typed_config(required=False, also={key: path for key, path in given.items() if path})
        if not any(getattr(cfg.init, part) for part in ("model", *weights.PARTS)):
            raise UserError(f"no weights are named; for example: {cli.shell_line('from-hf', *EXAMPLES['from-hf'])}")
        cli.need("--out=runs/joined")
        from_hf(cfg, FLAGS.out, prompt=bool(cfg.init.model) and FLAGS.config is None)
    else:
        cli.need(*EXAMPLES["to-hf"])
        kind = getattr(FLAGS, "as")
        to_hf(FLAGS.workdir, FLAGS.checkpoint, FLAGS.out, kind, FLAGS.drop_shortcuts, FLAGS.merge, FLAGS.verify)


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    command = cli.command_word()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that partial output is removed
    cli.define_config(workdir=False)
    flags.DEFINE_string("model", "", "A whole model, a folder or hub id in llava-hf layout or from to-hf.")
    flags.DEFINE_string("vision", "", "The vision tower, a folder, hub id, .safetensors or .onnx file.")
    flags.DEFINE_string("llm", "", "The LLM, a folder, hub id, .safetensors or .gguf file.")
    flags.DEFINE_string("fusion", "", "The projector of LLaVA or SparseCut, a .safetensors file.")
    flags.DEFINE_string("tokenizer", "", "Folder of the tokenizer; default: the LLM's.")
    flags.DEFINE_string("out", "", "Folder to write; must not exist yet.")
    flags.DEFINE_string("workdir", "", "Workdir of a run, or one written by from-hf.")
    flags.DEFINE_string("checkpoint", "latest", "Checkpoint: latest, best or a step.")
    flags.DEFINE_enum("as", "auto", export.KINDS, "What to write.")
    flags.DEFINE_boolean("drop_shortcuts", False, "Write llava without the shortcuts, which is a different model.")
    flags.DEFINE_boolean("merge", False, "Merge the run's LoRA adapters into the LLM's weights.")
    flags.DEFINE_boolean("verify", False, "Load the export and compare parameters and logits.")
    cli.run(lambda: main(command), __doc__, words_of=WORDS_OF)


if __name__ == "__main__":
    run()
