"""Times the parts of a config on this machine and compares each with its roofline.

    python -m sparsecut_jax.benchmark --config=configs/base.py
    python -m sparsecut_jax.benchmark --config=configs/side_by_side.py --parts=step,decode

Parts: tower, encode (tower and fusion), forward, gradient, step (compiled as in a run), prefill, decode (per token, batch
1), and input (batches from the config's data). Weights and batches are random. The floor of a part is the larger of its
FLOPs over the peak rate and its bytes over the memory bandwidth, both measured first (docs/speed.md).
"""

from __future__ import annotations

import os

from absl import flags

from sparsecut_jax.benchmarking import peaks, where
from sparsecut_jax.benchmarking.parts import PARTS, Bench, Timed
from sparsecut_jax.commandline import cli
from sparsecut_jax.planning.answer import default_stage
from sparsecut_jax.runtime.folders import make_folder, write_json
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

FLAGS = flags.FLAGS


def benchmark(cfg: Config) -> None:
    for part in FLAGS.parts or [""]:
        if part not in PARTS:
            raise UserError(
                f"--parts={','.join(FLAGS.parts)}: unknown part {part!r}; expected any of {', '.join(PARTS)}"
            )
    folder = make_folder("--out" if FLAGS.out else "config.workdir", FLAGS.out or cfg.workdir)

    # ------------------------------------------------------------------ the machine
    bench = Bench(cfg, default_stage(cfg, FLAGS.stage), FLAGS.steps, FLAGS.new, FLAGS.trace)
    if "input" in FLAGS.parts:
        _ = bench.data  # so that bad data is reported before the other parts take their time
    peak = peaks.measure(bench.dtype, bench.mesh)
    stage = bench.cfg.stages[bench.name]
    for note in bench.notes:
        print(f"note       {note}")
    print(f"devices    {bench.mesh.size} x {bench.device}, {bench.dtype}: {peak.flops / 1e9:,.0f} GFLOP/s in matmuls, "
          f"{peak.bandwidth / 1e9:,.1f} GB/s")  # fmt: skip
    print(
        f"batch      {stage.batch_size} sequences of {stage.seq_len} positions, {bench.slots} images each\n", flush=True
    )

    # ------------------------------------------------------------------ the parts
    timed = []
    try:
        for part in (part for part in PARTS if part in FLAGS.parts):
            print(f"timing     {part}", flush=True)
            timed.append(bench.time(part, peak))
    finally:  # show what was timed, even if a later part failed
        _show(timed)
    memory = bench.peak_memory()
    print(f"\nmemory     {memory / 2**20:,.0f} MiB at the peak")

    # ------------------------------------------------------------------ files
    path = os.path.join(folder, "benchmark.json")
    write_json(
        path, {**bench.facts(), "peak": vars(peak), "peak_memory": memory, "parts": [t.as_json() for t in timed]}
    )
    print(f"written    {path}")


def _show(timed: list[Timed]) -> None:
    rows = [[t.label, f"{t.median * 1e3:,.1f}", f"{t.best * 1e3:,.1f}", *_floor(t), t.rate, _first(t)] for t in timed]
    head = ["part", "median ms", "best ms", "floor ms", "floor / median", "rate", "first call s"]
    if rows:
        print("\n" + table(head, rows), flush=True)
    if any(t.disturbed for t in timed):
        print(f"\n{_warning([t for t in timed if t.disturbed])}", flush=True)
    for t in timed:
        if t.where:
            print(f"\nwhere the time goes, {t.label}\n{where.text(t.where)}", flush=True)


def _floor(t: Timed) -> list[str]:
    if not t.floor:
        return ["-", "-"]
    return [f"{t.floor * 1e3:,.1f} ({t.bound})", f"{t.floor / t.median:.0%}{' disturbed' if t.disturbed else ''}"]


def _warning(disturbed: list[Timed]) -> str:
    text = (
        f"disturbed  {', '.join(t.label for t in disturbed)}: faster than the floor, so other work on this machine slowed "
        "the measurement of its peak rates; measure again when it is idle"
    )
    if any(t.bound == "memory" for t in disturbed):
        text += ". A memory floor is no bound either where the data fit in the caches"
    return text


def _first(t: Timed) -> str:
    return f"{t.first:.1f}" if t.first else "-"


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    cli.define_config()
    flags.DEFINE_string("stage", "", "Stage of config.run_stages; default: the last one.")
    flags.DEFINE_list("parts", list(PARTS), f"Parts to time: {', '.join(PARTS)}.")
    flags.DEFINE_integer("steps", 5, "Timed calls per part (default 5), of which the median is shown.", lower_bound=1)
    flags.DEFINE_integer("new", 64, "Tokens to generate in decode (default 64).", lower_bound=2)
    flags.DEFINE_bool("trace", False, "Also trace where the time of tower, encode, forward, gradient and step goes.")
    flags.DEFINE_string("out", "", "Folder for benchmark.json; default: the config's workdir.")
    cli.run(lambda: benchmark(cli.typed_config()), __doc__)


if __name__ == "__main__":
    run()
