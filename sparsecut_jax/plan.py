"""What a run would need and take, before it is paid for: memory, FLOPs, time and price. No accelerator is needed.

    python -m sparsecut_jax.plan --config=configs/sparsecut.py:size=7b,stage=finetune --topology=v5e:8x8
    python -m sparsecut_jax.plan --config=configs/sparsecut.py:size=7b,stage=finetune --topology=h100:8 --price=2.5

For TPUs the real compiler is asked (pip install "jax[tpu]" on any machine), for GPUs and CPUs the analytic model
(docs/plan.md). Topologies: v5e:8x8, 2*v5e:16x16 (two slices), v5p:4x4x4, v6e:8x8, h100:8, h200:16, cpu:8.
"""

from __future__ import annotations

import os
import re
import sys

from absl import flags

from sparsecut_jax import cli
from sparsecut_jax.planning import answer, compiler, hardware, tables
from sparsecut_jax.settings import Config
from sparsecut_jax.training.workdir import write_json

TOPOLOGY = flags.DEFINE_string("topology", "", "Chips, for example v5e:8x8, 2*v5p:4x4x4, h100:8 or cpu:8.")
STAGE = flags.DEFINE_string("stage", "", "Stage of config.run_stages; default: the last one.")
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak rate that the run is assumed to reach.")
ROWS = flags.DEFINE_integer("rows", 0, "Rows of the dataset; default: those of config.data, where they are known.")
PRICE = flags.DEFINE_float("price", 0.0, "Price of one chip for an hour.")
SEARCH = flags.DEFINE_boolean("search", False, "Look for other settings also where these fit.")
OUT = flags.DEFINE_string("out", "", "Folder for plan.json and plan.png; default: runs/plan/ and a name.")


def plan(cfg: Config) -> None:
    # ------------------------------------------------------------------ what is asked
    question = answer.Question(
        topology=hardware.parse(TOPOLOGY.value),
        stage=answer.default_stage(cfg, STAGE.value),
        mfu=MFU.value,
        rows=ROWS.value,
        price=PRICE.value,
        search=SEARCH.value,
    )

    folder = OUT.value or os.path.join("runs/plan", file_name(cfg, question))
    os.makedirs(folder, exist_ok=True)  # an answer takes minutes: it must have a place

    # ------------------------------------------------------------------ the answer
    found = {"config": config_argument(), **answer.answer(cfg, question, tell=lambda text: print(text, flush=True))}
    print(f"\n{tables.text(found)}\n")

    # ------------------------------------------------------------------ files
    from sparsecut_jax.planning import chart  # here: matplotlib takes a third of a second

    write_json(os.path.join(folder, "plan.json"), found)
    chart.save(os.path.join(folder, "plan.png"), found)
    print(f"written    {os.path.join(folder, 'plan.json')}, plan.png")


def config_argument() -> str:
    """What --config names, with its arguments."""
    values = (arg.partition("=")[2] for arg in sys.argv if arg.lstrip("-").startswith("config="))
    return next(values, "") or sys.argv[sys.argv.index("--config") + 1]


def file_name(cfg: Config, question: answer.Question) -> str:
    """ "sparsecut_7b_finetune-instruct-v5e-8x8"."""
    parts = (os.path.basename(os.path.normpath(cfg.workdir)), question.stage, question.topology.text)
    return re.sub(r"[^\w.]+", "-", "-".join(parts))


if __name__ == "__main__":
    compiler.prepare()
    cli.define_config()
    cli.run(lambda: plan(cli.typed_config()), __doc__)
