"""Checks and previews data before training, and packs them for fast reading.

    python -m sparsecut_jax.data check --config=configs/base.py --config.data.source=rows.json --config.data.images=DIR
    python -m sparsecut_jax.data stats --config=configs/base.py
    python -m sparsecut_jax.data preview --config=configs/base.py
    python -m sparsecut_jax.data speed --config=configs/base.py
    python -m sparsecut_jax.data build --source=rows.json --images=DIR --out=DATASET

check reads every row and reports which are bad and why (exit code 2 if any are; duplicates and answers that do not fit
are warnings, or errors with --strict). stats shows lengths, images per row and how full batches are. preview draws the
first sequences of a stage as the model gets them. speed reads batches and shows images and tokens per second by number
of worker processes. build writes a TFDS dataset of ArrayRecord files, which config.data.source then names; image files
are kept byte for byte. The others write to the config's workdir.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from absl import flags

from sparsecut_jax import checks
from sparsecut_jax.commandline import cli, help_text
from sparsecut_jax.data import sources
from sparsecut_jax.data.check import check_rows
from sparsecut_jax.data.parts import Part
from sparsecut_jax.data.preview import preview
from sparsecut_jax.data.speed import speed
from sparsecut_jax.data.stats import stats
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime.folders import make_folder
from sparsecut_jax.runtime.progress import Progress
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError, nearest, shown

FLAGS = flags.FLAGS
COMMANDS = ("check", "stats", "preview", "speed", "build")
WORDS_OF = {
    "look": ("check",), "strict": ("check",), "stage": ("preview", "speed"), "workers": ("speed",), "seconds": ("speed",),
    "count": ("preview",), "source": ("build",), "images": ("build",), "out": ("build",), "skip_bad": ("build",),
    "workdir": ("check", "stats", "preview", "speed"),
}  # fmt: skip


def open_data(cfg: Config) -> setup.Data:
    """A config's data, all of whose rows are training rows here; the notes on its weight sources are printed."""
    opened = setup.open_weights(cfg)
    checks.check_room(opened.config)
    for line in opened.notes:
        print(line)
    whole = dataclasses.replace(opened.config.data, holdout=0)
    return setup.open_data(dataclasses.replace(opened, config=dataclasses.replace(opened.config, data=whole)))


@dataclasses.dataclass(frozen=True)
class Rows(Sequence):
    """The rows of a part, checked."""

    part: Part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int) -> dict:
        return self.part.row(i)


def build_dataset() -> None:
    from sparsecut_jax.data import build

    cfg = cli.typed_config(required=False)
    cli.need("--out=DATASET")
    source, images = FLAGS.source or cfg.data.source, FLAGS.images or cfg.data.images
    if cfg.data.mix and not FLAGS.source:
        raise UserError(f"--source is missing: the config mixes {len(cfg.data.mix)} sources, name one to build")
    data = dataclasses.replace(cfg.data, source=source, images=images, mix={}, holdout=0)
    stages = {name: dataclasses.replace(stage, sources=()) for name, stage in cfg.stages.items()}
    (part,) = sources.load_source(dataclasses.replace(cfg, data=data, stages=stages)).train.values()
    progress = Progress(len(part), 0, "rows")
    built = build.build(
        Rows(part), part.encoded, FLAGS.out, skip=FLAGS.skip_bad, progress=lambda done, total: progress.update()
    )
    progress.close()
    for error in built.skipped:
        print(f"left out: {shown(str(error))}")
    print(f"{built.rows:,} rows, {built.images:,} images, {built.bytes / 2**20:,.1f} MiB in {built.shards} shards, "
          f"{built.seconds:.1f} s: {FLAGS.out}")  # fmt: skip


def main(command: str) -> None:
    if command not in COMMANDS:
        got = f"unknown command {command!r}{nearest(command, COMMANDS)}" if command else "no command given"
        example = cli.shell_line("check", "--config=configs/own.py:source=rows.json,images=pictures")
        raise UserError(f"{got}; expected {help_text.one_of(COMMANDS)}; for example: {example}")
    if command == "build":
        build_dataset()
        return
    cfg = cli.typed_config()
    make_folder("config.workdir", cfg.workdir)
    data = open_data(cfg)
    cfg, readers = data.config, data.readers
    if command == "check":
        check_rows(readers, FLAGS.look, cfg.workdir, FLAGS.strict)
    elif command == "stats":
        stats(readers, cfg)
    else:
        stage = FLAGS.stage or cfg.run_stages[-1]
        if stage not in readers:
            raise UserError(f"--stage={stage!r} is not one of the stages of the run: {', '.join(readers)}")
        if command == "preview":
            preview(readers[stage], cfg, stage, FLAGS.count)
        else:
            speed(readers[stage], cfg, stage, _counts(FLAGS.workers), FLAGS.seconds)


def _counts(given: list[str]) -> list[int]:
    """Numbers of worker processes. Raises UserError."""
    if not given or not all(re.fullmatch("[0-9]{1,3}", count) and int(count) <= checks.MOST_WORKERS for count in given):
        raise UserError(f"--workers={','.join(given)!r}: expected numbers from 0 to {checks.MOST_WORKERS}, as in 0,1,2")
    return [int(count) for count in given]


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    command = cli.command_word()
    cli.define_config()
    flags.DEFINE_enum(
        "look",
        "decode",
        ("none", "stat", "decode"),
        "Check of images: open each (decode), only that it exists (stat), or none.",
    )
    flags.DEFINE_boolean("strict", False, "Duplicates and answers beyond seq_len are errors, not warnings.")
    flags.DEFINE_string("stage", "", "Stage whose batches are read; default: the last one.")
    flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes to try.")
    flags.DEFINE_float("seconds", 10, "Seconds to time each number of processes.", lower_bound=0.1, upper_bound=3600)
    flags.DEFINE_integer("count", 8, "Number of sequences to draw.", lower_bound=1, upper_bound=200)
    flags.DEFINE_string("source", "", "File of conversations, or any other source; default: the config's.")
    flags.DEFINE_string("images", "", "Folder of the images.")
    flags.DEFINE_string("out", "", "Folder to write, local or gs://; must not exist yet.")
    flags.DEFINE_boolean("skip_bad", False, "Leave broken rows out instead of stopping at the first.")
    cli.run(lambda: main(command), __doc__, words_of=WORDS_OF)


if __name__ == "__main__":
    run()
