"""Compares all ways of bringing vision into the LLM on equal terms: trains each with several seeds, and tabulates them.

    python -m sparsecut_jax.lab --config=configs/lab.py
    python -m sparsecut_jax.lab --config=configs/lab.py --arms=llava,channel,dense --seeds=5
    python -m sparsecut_jax.lab --config=configs/lab.py --table          the tables of what has finished, without training

The config file lists its arms as ARMS, and takes `way=ARM`. Every run is the command `train` in a folder of its own under
--out; its output goes to ARM-SEED.txt there. A run that has finished is recorded in OUT/lab.jsonl and not run again, so the same
command goes on after a kill, and adds seeds or arms later. The checkpoints of a recorded run are removed.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from absl import flags

from sparsecut_jax.commandline import cli, config_files
from sparsecut_jax.evaluation import arms
from sparsecut_jax.evaluation.arms import Record
from sparsecut_jax.runtime.folders import make_folder, print_files
from sparsecut_jax.types import UserError, nearest

FLAGS = flags.FLAGS
RECORDS = "lab.jsonl"
Records = dict[tuple[str, int], Record]  # by arm and seed


def main() -> None:
    cli.need("--config=configs/lab.py")
    for name in ("seeds", "jobs"):
        if FLAGS[name].value < 1:
            raise UserError(f"--{name}={FLAGS[name].value}: expected at least 1")
    out = make_folder("--out", FLAGS.out)
    file, _, variant = FLAGS.config.partition(":")
    config = _loaded(file)
    chosen = _chosen(file, config)
    path = os.path.join(out, RECORDS)
    records: Records = {(record.arm, record.seed): record for record in arms.read_records(path)}
    # Seed by seed: a comparison that is cut short has as many of one arm as of another.
    wanted = [(arm, seed) for seed in range(FLAGS.seeds) for arm in chosen]
    asked = {arm: _digest(config, arm, variant) for arm in chosen}
    for arm, seed in wanted:
        record = records.get((arm, seed))
        if record and record.settings != asked[arm]:
            raise UserError(
                f"{path} has a run of {arm!r} with other settings than {FLAGS.config} has now; choose another --out"
            )
    missing = [each for each in wanted if each not in records]
    failed: dict[tuple[str, int], str] = {}
    if not FLAGS.table and missing:
        print(
            f"{len(wanted) - len(missing)} of {len(wanted)} runs are recorded in {path}; {len(missing)} to go",
            flush=True,
        )
        failed = _record_all(missing, out, file, variant, asked, records)
    done = [records[each] for each in wanted if each in records]
    if not done:
        raise UserError(f"{path} has no finished run of {', '.join(chosen)}")
    text = arms.tables(done)
    print(f"\n{text}")
    with open(os.path.join(out, "lab.md"), "w") as written:
        written.write(text)
    arms.save_curves(os.path.join(out, "lab.png"), done)
    print(f"written to {out}:")
    print_files(out, {"lab.md": "these tables", "lab.png": "the learning curves", RECORDS: "a record of every run"})
    if failed:
        (arm, seed), reason = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(wanted)} runs failed; the first, {arm} with seed {seed}: {reason}")


def _record_all(
    missing: list[tuple[str, int]], out: str, file: str, variant: str, asked: dict[str, str], records: Records
) -> dict[tuple[str, int], str]:
    """Trains what is missing and adds it to `records` and to lab.jsonl; returns {(arm, seed): why it failed}."""
    failed = {}
    folder_of = lambda arm, seed: os.path.join(out, f"{arm}-{seed}")
    start = lambda arm, seed: _start(f"{file}:{_joined(arm, variant)}", folder_of(arm, seed), seed)
    with contextlib.closing(_ended(missing, start)) as ended:
        for number, ((arm, seed), code, seconds) in enumerate(ended, 1):
            folder, name = folder_of(arm, seed), f"[{number}/{len(missing)}] {arm}, seed {seed}"
            if code:
                failed[arm, seed] = _last_line(f"{folder}.txt")
                print(f"{name}: failed, see {folder}.txt: {failed[arm, seed]}", flush=True)
                continue
            record = records[arm, seed] = arms.record_of(folder, arm, seed, asked[arm])
            arms.write_records(os.path.join(out, RECORDS), records.values())
            shutil.rmtree(os.path.join(folder, "checkpoints"), ignore_errors=True)
            reached = f"learning curve {record.learning:.1%}, test {record.final():.1%}"
            print(f"{name}: {reached}, in {seconds:.0f} s", flush=True)
    return failed


def _ended(
    waiting: Sequence[tuple[str, int]], start: Callable[[str, int], subprocess.Popen]
) -> Iterator[tuple[tuple[str, int], int, float]]:
    """Starts the runs, --jobs at a time, and yields each as it ends, with its exit code and the seconds that it took.

    Runs that have not ended when this is closed are told to: they save, and the next start resumes them.
    """
    waiting, running = collections.deque(waiting), {}
    try:
        while waiting or running:
            while waiting and len(running) < FLAGS.jobs:
                each = waiting.popleft()
                running[each] = start(*each), time.monotonic()
            time.sleep(0.2)
            for each, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[each]
                    yield each, process.returncode, time.monotonic() - began
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _start(config: str, folder: str, seed: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsecut_jax.train", f"--config={config}"]
    with open(f"{folder}.txt", "a") as log:
        return subprocess.Popen(
            [*command, f"--workdir={folder}", f"--config.seed={seed}"], stdout=log, stderr=subprocess.STDOUT
        )


def _last_line(path: str) -> str:
    with open(path, errors="replace") as file:
        return (file.read().strip().splitlines() or ["it wrote nothing"])[-1]


def _joined(arm: str, variant: str) -> str:
    """ "way=ARM" and other arguments of the config file."""
    return ",".join(filter(None, (f"way={arm}", variant)))


def _loaded(file: str) -> ModuleType:
    """The config file as a module. Raises UserError if it lists no arms."""
    path = config_files.find(file)
    config_files.provide_siblings(path)
    spec = importlib.util.spec_from_file_location("lab_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not getattr(module, "ARMS", ()):
        raise UserError(f"{file} lists no ARMS to compare; expected a config file like configs/lab.py")
    return module


def _chosen(file: str, config: ModuleType) -> list[str]:
    """The arms of --arms, or all. Raises UserError for an unknown one."""
    for arm in FLAGS.arms:
        if arm not in config.ARMS:
            raise UserError(
                f"--arms: {file} has no {arm!r}{nearest(arm, config.ARMS)}; it has {', '.join(config.ARMS)}"
            )
    return list(dict.fromkeys(FLAGS.arms)) or list(config.ARMS)


def _digest(config: ModuleType, arm: str, variant: str) -> str:
    """Of all settings of an arm but the workdir and where features are stored."""
    raw = config.get_config(_joined(arm, variant)).to_dict()
    raw["workdir"] = raw["data"]["features_dir"] = ""
    raw["init"]["vision"] = os.path.basename(raw["init"]["vision"])  # wherever the package is installed
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:16]


def run() -> None:
    """The command: defines its flags and ends with its exit code."""
    flags.DEFINE_string(
        "config", "", "Config file that lists its arms, such as configs/lab.py or configs/lab.py:smoke."
    )
    flags.DEFINE_list("arms", [], "Arms to compare; left out: all.")
    flags.DEFINE_integer("seeds", 3, "Runs of each arm, with seeds 0, 1, ...")
    flags.DEFINE_string("out", "runs/lab", "Folder to write to.")
    flags.DEFINE_integer("jobs", 1, "Runs at the same time. Their times are comparable only among runs made alike.")
    flags.DEFINE_boolean("table", False, "Print the tables of what has finished, without training.")
    cli.run(main, __doc__, resumes=True)


if __name__ == "__main__":
    run()
