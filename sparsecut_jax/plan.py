"""Estimates memory, FLOPs, time and price of a run before you rent hardware. No accelerator is needed.

    python -m sparsecut_jax.plan --config=configs/sparsecut.py:size=7b,stage=finetune --topology=v5e:8x8
    python -m sparsecut_jax.plan --config=configs/sparsecut.py:size=7b,stage=finetune --topology=h100:8 --price=2.5
    python -m sparsecut_jax.plan --config=configs/sparsecut.py:size=7b,stage=finetune --topology=v5e:8x8 --ways=all

For TPUs the step is compiled by the real TPU compiler (pip install "jax[tpu]" on any machine); for GPUs and CPUs an
analytic model is used (docs/plan.md). Topologies: v5e:8x8, 2*v5e:16x16 (two slices), v5p:4x4x4, v6e:8x8, h100:8, h200:16,
cpu:8. Separate several by commas to compare them; --rows_per_chip=1 makes the batch grow with the chips.

--ways=all, or --ways=mlp,channel, compares what ways of fusing cost in the same config, by the analytic model alone: ways.json
and ways.md. --equal_resolution gives those that read one view a picture of as much detail as the others' crops have; --compile
also compiles the step of each for TPUs.
"""

from __future__ import annotations

import os
import re
import sys

from absl import flags

from sparsecut_jax.commandline import cli
from sparsecut_jax.models import ways
from sparsecut_jax.planning import answer, compiling, costs, costs_table, tables
from sparsecut_jax.runtime import hardware
from sparsecut_jax.runtime.folders import make_folder, write_json
from sparsecut_jax.runtime.progress import busy
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

FLAGS = flags.FLAGS


WAYS_ONLY, PLAN_ONLY = ("equal_resolution", "compile"), ("mfu", "rows", "price", "search")  # flags


def plan(cfg: Config) -> None:
    if FLAGS.ways:
        return ways_of(cfg)
    _refuse(WAYS_ONLY, "without --ways, which it is for")

    # ------------------------------------------------------------------ the requests
    cli.need("--topology=v5e:8x8")
    stage = answer.default_stage(cfg, FLAGS.stage)
    topologies = [hardware.parse(text) for text in FLAGS.topology.split(",")]
    several = len(topologies) > 1
    requests = [
        answer.PlanRequest(
            topology=topology,
            stage=stage,
            mfu=FLAGS.mfu,
            rows=FLAGS.rows,
            price=FLAGS.price,
            search=FLAGS.search or several,
            checked=1 if several else 2,  # each check is a compilation
        )
        for topology in topologies
    ]
    if several and not all(topology.chip.flops for topology in topologies):
        raise UserError(f"--topology={FLAGS.topology}: cpu has no published peak rate to compare; leave it out")
    folder = make_folder("--out", FLAGS.out or os.path.join("runs/plan", file_name(cfg, stage)))

    # ------------------------------------------------------------------ the plans
    with open(os.dup(2), "w") as stderr:  # a copy, so that the compiler's own output can be hidden
        during = lambda what: busy(what, stderr)
        plans = [
            {"config": config_argument(), **answer.answer(with_rows(cfg, request), request, during)}
            for request in requests
        ]

    # ------------------------------------------------------------------ output
    from sparsecut_jax.planning import chart  # here: matplotlib takes a third of a second

    print(f"\n{tables.scaling_text(plans) if several else tables.text(plans[0])}\n")
    name = "scaling" if several else "plan"
    write_json(os.path.join(folder, f"{name}.json"), plans if several else plans[0])
    draw = chart.save_scaling if several else chart.save
    draw(os.path.join(folder, f"{name}.png"), plans if several else plans[0])
    print(f"written    {os.path.join(folder, name)}.json, {name}.png")


def ways_of(cfg: Config) -> None:
    """Prints and writes what ways of fusing cost."""
    chosen = ways.chosen(FLAGS.ways)
    _refuse(PLAN_ONLY, "with --ways, which compares steps")
    cli.need("--topology=v5e:8x8")
    if "," in FLAGS.topology:
        raise UserError(f"--topology={FLAGS.topology}: --ways compares on one topology; expected one, such as v5e:8x8")
    stage, topology = answer.default_stage(cfg, FLAGS.stage), hardware.parse(FLAGS.topology)
    if FLAGS.compile and topology.chip.platform != "tpu":
        raise UserError(f"--compile: the compiler is that for TPUs, not for {topology.text}; leave it out")
    folder = make_folder("--out", FLAGS.out or os.path.join("runs/plan", file_name(cfg, stage)))
    cfg = with_rows(cfg, answer.PlanRequest(topology, stage))
    with open(os.dup(2), "w") as stderr:
        during = lambda what: busy(what, stderr)
        found = costs.costs(cfg, stage, topology, chosen, FLAGS.compile, FLAGS.equal_resolution, during)
    found = {"config": config_argument(), **found}
    print(f"\n{costs_table.text(found)}\n")
    name = os.path.join(folder, "ways_equal_resolution" if FLAGS.equal_resolution else "ways")
    write_json(f"{name}.json", found)
    with open(f"{name}.md", "w") as file:
        file.write(costs_table.page(found))
    print(f"written    {name}.json, {os.path.basename(name)}.md")


def _refuse(names: tuple[str, ...], why: str) -> None:
    """Raises UserError for flags that are given, but have no effect."""
    for name in names:
        if FLAGS[name].present:
            raise UserError(f"--{name} has no effect {why}; leave it out")


def with_rows(cfg: Config, request: answer.PlanRequest) -> Config:
    """The config with --rows_per_chip sequences per chip in each micro-batch; unchanged without that flag."""
    if not FLAGS.rows_per_chip:
        return cfg
    rows = FLAGS.rows_per_chip * request.topology.chips * cfg.stages[request.stage].accumulate
    return cfg.with_stage(request.stage, batch_size=rows)


def config_argument() -> str:
    """The value of --config: the config file and its arguments."""
    values = (arg.partition("=")[2] for arg in sys.argv if arg.lstrip("-").startswith("config="))
    return next(values, "") or sys.argv[sys.argv.index("--config") + 1]


def file_name(cfg: Config, stage: str) -> str:
    """The plan's folder, for example "sparsecut_7b_finetune-instruct-v5e-8x8"."""
    parts = (os.path.basename(os.path.normpath(cfg.workdir)), stage, FLAGS.topology)
    return re.sub(r"[^\w.]+", "-", "-".join(parts))


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    compiling.prepare()
    cli.define_config()
    flags.DEFINE_string("topology", "", "Chips, for example v5e:8x8, 2*v5p:4x4x4, h100:8 or cpu:8.")
    flags.DEFINE_string("stage", "", "Stage of config.run_stages; default: the last one.")
    flags.DEFINE_float("mfu", 0.4, "Assumed model FLOPs utilisation, as a share of the peak rate.")
    flags.DEFINE_integer(
        "rows_per_chip",
        0,
        "Sequences per chip and micro-batch; default: the config's batch size, whatever the number of chips.",
        lower_bound=0,
    )
    flags.DEFINE_integer("rows", 0, "Rows of the dataset; default: counted from config.data, if it is on this machine.")
    flags.DEFINE_float("price", 0.0, "Price of one chip-hour.")
    flags.DEFINE_boolean("search", False, "Search for other settings even if these fit.")
    flags.DEFINE_list("ways", [], "Ways of fusing to compare, or all; names of files in sparsecut_jax/models/fusing.")
    flags.DEFINE_boolean("equal_resolution", False, "With --ways: the same detail for ways that read one view alone.")
    flags.DEFINE_boolean("compile", False, "With --ways: compile the step of each way, too; minutes each.")
    flags.DEFINE_string("out", "", "Folder for the files; default: a new folder in runs/plan/.")
    cli.run(lambda: plan(cli.typed_config()), __doc__)


if __name__ == "__main__":
    run()
