"""Several processes of one machine as one run, through the real train command: the same losses, and what a kill does.

What is said in which case is in tests/test_watch.py, which rows a process holds in tests/test_placing.py.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import runs
from sparsecut_jax import config as config_lib
from sparsecut_jax.runs import workdir as workdir_lib
from sparsecut_jax.runs.run import load_run
from sparsecut_jax.runtime import hosts, sharding
from sparsecut_jax.train import train
from sparsecut_jax.training.report import read_metrics
from sparsecut_jax.types import UserError

# The rate is the same at every step, so that runs of different lengths begin with the same steps.
CHANGES = {
    "run_stages": ("instruct",), "stages.instruct.max_steps": 8, "stages.instruct.warmup": 0.0,
    "stages.instruct.final_lr": 1.0, "stages.instruct.trainable": ("fusion/.*", "llm/.*"),
    "checkpoint.every": 2, "data.max_bad_fraction": 0.5,
}  # fmt: skip
ENDLESS = {"stages.instruct.max_steps": 10_000, "checkpoint.every": 0, "eval.every": 0, "eval.test": False}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 rows; of the held-out ones the picture of row 4 is broken, of the others that of row 5."""
    folder = tmp_path_factory.mktemp("pictures")
    runs.draw_rows(folder)
    for i in (4, 5):
        (folder / f"{i}.png").write_bytes(b"<html>")
    return folder


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def several(count: int, *command: str) -> list[subprocess.Popen]:
    """Starts a command as `count` processes with one device each."""
    port = free_port()
    meet = lambda i: [
        f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={i}", "--heartbeat_timeout=5",
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *command, *meet(i)],
            cwd=runs.ROOT, env=runs.with_devices(1), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip


def trained(count: int, folder: Path, pictures: Path, changes: dict) -> list[subprocess.Popen]:
    """A run in `folder`/run as `count` processes, under way."""
    config = runs.write_config(folder / "config.py", runs.small(pictures, folder / "run", set=changes))
    return several(count, "-m", "sparsecut_jax.train", f"--config={config}")


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    return [runs.finish(process) for process in processes]


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory) -> Path:
    """Workdir of the run as one process with two devices, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda sizes, *_: make_mesh(sizes, jax.devices()[:2]))
        train(config_lib.check(runs.small(pictures, folder / "run", set=CHANGES)))
    return folder / "run"


def losses(workdir: Path, kind: str = "loss") -> list[float]:
    return [line[kind] for line in read_metrics(str(workdir)) if kind in line]


def wait_until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def parameters(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_run(str(workdir)).params)]


def test_a_killed_process_ends_the_other_with_its_name_and_a_restart_equals_one_undisturbed_process(
    alone, pictures, tmp_path
):
    first, second = trained(2, tmp_path, pictures, CHANGES)
    wait_until((tmp_path / "run" / "checkpoints" / "2").exists, first)
    second.kill()
    began = time.monotonic()
    code, _, err = runs.finish(first)
    assert time.monotonic() - began < 60  # five seconds without a heartbeat, and what a busy machine needs
    name = f"process 1 of 2 (host {socket.gethostname()}, pid {second.pid})"
    assert (code, err) == (5, f"{name} died; run the same command on all hosts to resume from the last checkpoint\n")
    runs.finish(second)

    (code, out, err), silent = finish(trained(2, tmp_path, pictures, CHANGES))
    assert (code, err) == (0, "") and silent == (0, "", "")  # only the first process prints
    for text in (
        "devices    2 x cpu (cpu), 2 processes",
        "resuming",
        "instruct 8/8",
        "sample question",
        "results.json",
    ):
        assert out.count(text) == 1, text
    assert "at step 8" not in out and "Gloo" not in out
    for kind in ("loss", "holdout_loss"):
        np.testing.assert_allclose(losses(tmp_path / "run", kind), losses(alone, kind), rtol=1e-5)
    for a, b in zip(parameters(tmp_path / "run"), parameters(alone), strict=True):
        np.testing.assert_array_equal(a, b)  # a sum of two is the same in any order

    results = [json.loads((workdir / "results.json").read_text()) for workdir in (alone, tmp_path / "run")]
    for found in results:
        del found["seconds"]
    assert results[0] == results[1]
    assert results[1]["bad_samples"] == {"broken_image": 1} and results[1]["rows/holdout/broken_rows"] == 1
    assert (alone / "answers.jsonl").read_text() == (tmp_path / "run" / "answers.jsonl").read_text()
    noted = [path.read_text() for path in (tmp_path / "run").glob("bad_samples*.jsonl")]
    assert {text.count("\n") for text in noted} == {1}  # by every process that met the row


def test_four_processes_that_share_rows_by_pairs_and_a_sigterm_to_one(alone, pictures, tmp_path):
    """The tensor axis runs across processes: 0 and 1 hold the same rows, 2 and 3 the others."""
    processes = trained(4, tmp_path, pictures, {**CHANGES, **ENDLESS, "mesh.data": 2, "mesh.tensor": 2})
    wait_until(lambda: len(losses(tmp_path / "run")) >= 3, processes[0])
    processes[2].send_signal(signal.SIGTERM)
    (code, _, err), *others = finish(processes)
    assert code == 3 and others == [(3, "", "")] * 3
    (step,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped by SIGTERM after saving step {step}" in err and err.count("\n") == 1
    np.testing.assert_allclose(losses(tmp_path / "run")[:3], losses(alone)[:3], rtol=1e-5)


MEET = """
import time
from sparsecut_jax.commandline import cli
from sparsecut_jax.runtime import hosts

def work():
    print("met", flush=True)
    time.sleep(60)

hosts.define_flags()
cli.run(work, "")
"""


def test_the_end_of_the_first_process_is_told_with_its_name():
    processes = several(3, "-c", MEET)
    assert processes[0].stdout.readline() == "met\n"
    processes[0].kill()
    name = f"process 0 of 3 (host {socket.gethostname()}, pid {processes[0].pid})"
    assert [runs.finish(process) for process in processes[1:]] == [(5, "", f"{name} died\n")] * 2
    runs.finish(processes[0])


# ----------------------------------------------------------------------------------------------------------------------
# who this process is


@pytest.fixture
def asked(monkeypatch):
    """Function of flags: which process they make this one."""
    if "coordinator" not in flags.FLAGS:
        hosts.define_flags()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)

    def read(**given):
        with flagsaver.flagsaver(**given):
            return hosts._asked() or hosts._found()

    return read


def test_alone_without_flags(asked):
    assert asked() is None
    assert asked(processes=1).count == 1


def test_flags_and_jax_variables(asked, monkeypatch):
    expected = hosts.Process(2, 4, "a:1", 300, 60)
    assert asked(coordinator="a:1", processes=4, process=2) == expected
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert asked(process=2) == expected  # a flag wins


@pytest.mark.parametrize(("tasks", "index"), [(4, 3), (1, 0)])
def test_slurm(asked, monkeypatch, tasks, index):
    for name, value in {
        "JOB_ID": "7", "STEP_NODELIST": "n[1-2]", "NTASKS": str(tasks), "PROCID": str(index), "LOCALID": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert asked() == hosts.Process(index, tasks, None, 300, 60)
    assert asked(processes=1) == hosts.Process(0, 1, None, 300, 60)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"processes": 2}, "--processes needs --coordinator too; a multi-process run is started with"),
        ({"coordinator": "a:1", "processes": 2}, "--coordinator needs --process too; "),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process=2 of --processes=2: expected 0 to 1"),
        ({"coordinator": "a:1", "processes": 2, "process": -1}, "--process=-1 of --processes=2: expected 0 to 1"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator='a': expected HOST:PORT"),
        ({"coordinator": "a:70000", "processes": 2, "process": 0}, "--coordinator='a:70000': expected HOST:PORT"),
    ],
)
def test_flags_that_do_not_go_together(asked, given, sentence):
    with pytest.raises(UserError) as caught:
        asked(**given)
    assert str(caught.value).startswith(sentence)


def test_variables_that_are_no_numbers(asked, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(UserError, match="^JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers: "):
        asked()


def test_a_coordinator_that_does_not_answer():
    me = hosts.Process(1, 2, f"localhost:{free_port()}", 0, 60)
    with pytest.raises(
        UserError, match=r"^--coordinator=localhost:\d+ did not answer within 0 s \(.*\); start process 0"
    ):
        hosts._check_coordinator(me, *hosts.watch.address(me.coordinator))


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        me = hosts.Process(0, 2, f"localhost:{server.getsockname()[1]}", 0, 60)
        with pytest.raises(UserError, match=r"^port \d+ of --coordinator=.* cannot be used \(Address already in use\)"):
            hosts._check_coordinator(me, *hosts.watch.address(me.coordinator))


def test_a_workdir_that_hosts_do_not_share(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "_me", hosts.Process(1, 2, "a:1", 300, 60))
    monkeypatch.setattr(hosts, "hear", {"workdir": "process 0 of 2 (host a, pid 1) 17"}.get)
    refused = pytest.raises(UserError, match=r"is not the folder of process 0; expected one that all hosts share$")
    with refused, workdir_lib.locked(str(tmp_path)):
        pass
    (tmp_path / ".lock").write_text("process 0 of 2 (host a, pid 1) 17")
    with workdir_lib.locked(str(tmp_path)):
        pass
