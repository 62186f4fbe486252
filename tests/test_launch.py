"""The scripts of launch/, with fakes of gcloud, kubectl and SLURM that note their calls. No cloud is touched."""

from __future__ import annotations

import dataclasses
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

import runs
from sparsecut_jax.runtime import platforms
from sparsecut_jax.types import UserError

SCRIPTS = ("tpu_vm", "gke", "slurm", "local")
CONFIG = "--config=configs/base.py"

# FAIL_AT: part of the command line that ends with FAIL_CODE; ONCE: only the first time. HANG_AT: one that never ends.
FAKE = r"""#!/bin/bash
name=${0##*/}
if [[ $name == date ]]; then echo 2025-01-02T03:04:05Z; exit; fi
line="$name $*"
{ printf '%s\x1f' "$name" "$@"; echo; } >>"$LOG"
[[ $name != srun ]] || echo "$JAX_LOCAL_DEVICE_IDS" >"$LOG.devices"
[[ $line != *" apply "* ]] || cat >"$LOG.applied"
[[ $line != *" scp "*.tgz* ]] || cp "$5" "$LOG.tgz"
if [[ ${HANG_AT-} && $line == *"$HANG_AT"* ]]; then touch "$LOG.hangs"; exec sleep 60; fi
if [[ ${FAIL_AT-} && $line == *"$FAIL_AT"* && ! -e $LOG.failed ]]; then
  [[ ! ${ONCE-} ]] || touch "$LOG.failed"
  exit "${FAIL_CODE-1}"
fi
case $line in
  *" list "* | *" get "*=name*) echo "${LISTED-}" ;;
  "squeue "*) echo "${STATE-RUNNING}" ;;
  *" describe "*) echo "${STATE-ACTIVE}" ;;
  *" get pods "*) echo "${CODES-}" ;;
  *terminalState*) echo "${STATE-Completed}" ;;
esac
"""


@dataclasses.dataclass
class Ended:
    """How a script ended, and the commands it called, each as one line of shell."""

    code: int
    out: str
    err: str
    called: list[str]


@pytest.fixture
def fakes(tmp_path) -> Path:
    """Folder with the fakes; $LOG and what else they write lie beside it."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    for name in ("gcloud", "kubectl", "sbatch", "scontrol", "squeue", "srun", "date", "mv"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def start(fakes, tmp_path):
    """Function of a command and environment variables: the process, which finds the fakes before anything else."""

    def started(*command: str, **environment: str) -> subprocess.Popen:
        env = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "LAUNCH_POLL": "0"}
        env |= {"LOG": str(tmp_path / "log"), **environment}
        return subprocess.Popen(
            command, cwd=runs.ROOT, env=env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return started


@pytest.fixture
def launch(start, tmp_path):
    """Function of a script's name, its arguments and environment variables: how it ended."""

    def launched(script: str, *args: str, **environment: str) -> Ended:
        return ended(start(f"launch/{script}.sh", *args, **environment))

    def ended(process: subprocess.Popen) -> Ended:
        code, out, err = runs.finish(process, 30)
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        for file in (log, tmp_path / "log.failed"):
            file.unlink(missing_ok=True)
        return Ended(code, out, err, [shlex.join(line.split("\x1f")[:-1]) for line in lines])

    launched.ended = ended
    return launched


def tpu(*args: str, type: str = "v5litepod-8") -> list[str]:
    return ["tpu_vm", "--name=run-1", "--zone=z", f"--type={type}", *args, "--", CONFIG]


TWO = tpu("--slices=2", "--spot", "--mount=nfs:/share", "--project=p", type="v5litepod-16")
GKE = ["gke", "--name=run-1", "--type=v5litepod-16", "--claim=shared", "--", CONFIG]
SLURM = ["slurm", "--nodes=2", "--partition=gpu", "--python=python3", "--", CONFIG, "--config.llm.layers=2"]

# ----------------------------------------------------------------------------------------------------------------------
# all scripts


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    files = sorted(str(file) for file in (runs.ROOT / "launch").glob("*.sh"))
    done = subprocess.run(["shellcheck", "--external-sources", *files], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header(launch, script):
    done = launch(script, "--help")
    assert (done.code, done.err, done.called) == (0, "", [])
    header = (runs.ROOT / "launch" / f"{script}.sh").read_text().split("\n\n")[0].splitlines()[1:]
    assert done.out == "".join(f"{line[2:]}\n" for line in header)
    assert f"launch/{script}.sh --" in done.out and "--dry-run" in done.out


@pytest.mark.parametrize(
    "args",
    [tpu(), tpu("--queued"), TWO, tpu("--keep"), GKE, [*GKE[:-2], "--slices=2", "--spot", *GKE[-2:]], SLURM],
    ids=lambda args: "_".join(args[:1] + [arg.strip("-") for arg in args if arg.count("=") == 0 and arg != "--"][1:]),
)
def test_a_dry_run_prints_what_a_run_calls(launch, start, tmp_path, args):
    """What it prints, given to a shell, calls the same commands as the run; and it calls none itself."""
    dry = launch(args[0], "--dry-run", *args[1:])
    assert (dry.code, dry.err, dry.called) == (0, "", [])
    real = launch(*args)
    assert (real.code, real.out) == (0, "")
    applied = tmp_path / "log.applied"
    manifest = applied.read_text() if applied.exists() else ""
    again = launch.ended(start("bash", "-ec", dry.out))
    assert (again.code, again.called) == (0, real.called) and real.called
    assert manifest == (applied.read_text() if applied.exists() else "")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["tpu_vm"],
            "no arguments; for example: launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-8 -- "
            "--config=configs/base.py (--help lists the flags)\n",
        ),
        (["gke"], "no arguments; for example: launch/gke.sh --name=NAME --type=v5litepod-16 --claim=PVC -- --config"),
        (
            ["slurm"],
            "no arguments; for example: launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=24:00:00 -- --config",
        ),
        (
            ["local"],
            "no arguments; for example: launch/local.sh --processes=2 --devices=2 -- --config=configs/base.py:s",
        ),
        (["tpu_vm", "--zone=z"], "--name is missing; for example --name=run-1"),
        (["tpu_vm", "--name=A"], "--name=A: expected up to 40 lower-case letters"),
        (["tpu_vm", "--name=a"], "--zone is missing; for example --zone=us-west4-a"),
        (["tpu_vm", "--name=a", "--zone=z"], "--type is missing; for example --type=v5litepod-16"),
        (
            tpu(type="v5e-16"),
            "--type=v5e-16: unknown slice type; expected v4-8 to v4-4096, v5litepod-1 to v5litepod-256, v5p-",
        ),
        (
            tpu(type="v6e-12"),
            "--type=v6e-12: unknown slice type; expected one of v6e-1 v6e-4 v6e-8 v6e-16 v6e-32 v6e-64 v6e-128 v6e-256\n",
        ),
        (tpu("--slices=none"), "--slices=none: expected an integer, 1 or more"),
        (tpu("--slices=0"), "--slices=0: expected an integer, 1 or more"),
        (tpu("--mount=share"), "--mount=share: expected HOST:/SHARE"),
        (tpu(type="v5p-16"), "1 x v5p-16 has 2 hosts, which must share runs/; set --mount=HOST:/SHARE"),
        (
            tpu("--requeue=3"),
            "--requeue resumes from what the preempted slice saved, which needs a share; set --mount=HOST:/SHARE",
        ),
        (
            tpu("--slices=2", "--mount=h:/s", type="v5p-512"),
            "2 x v5p-512 has 128 hosts; for more than 64 in several slices use launch/gke.sh",
        ),
        (tpu("--spott"), "unknown flag --spott (--help lists the flags)"),
        (tpu("--spott=1"), "unknown flag --spott= (--help lists the flags)"),
        (tpu("--slices"), "--slices needs a value: --slices=..."),
        (tpu("spot"), "unexpected argument 'spot'; arguments for the training go after --"),
        (tpu()[:-1], "no arguments for the training; add them after --, for example -- --config=configs/base.py"),
        ([*tpu(), "--config.workdir=gs://b/x"], "--config.workdir=gs://b/x: the workdir must be a folder that all"),
        (
            [*tpu()[:-1], "--config=configs/bse.py:smoke"],
            "configs/bse.py: no such file",
        ),
        ([*tpu()[:-1], "--config", "configs/bse.py"], "configs/bse.py: no such file"),
        ([*tpu()[:-1], "-config=configs"], "configs: no such file"),
        (["slurm", "--python=python3", "--", "--config=configs/bse.py"], "configs/bse.py: no such file"),
        (
            [*tpu()[:-1], "--config=tests/runs.py"],
            "tests/runs.py would not be copied: only files that git tracks are, without tests and docs; git add it",
        ),
        (
            [*tpu()[:-1], "--seed=1"],
            "--config is missing from the training's arguments; for example -- --config=configs/base.py",
        ),
        (
            [*tpu(), "--config.workdir=/tmp/out"],
            "--config.workdir=/tmp/out: only runs/ outlives the hosts; choose a folder in it",
        ),
        ([*tpu(), "--workdir=/tmp/out"], "--workdir=/tmp/out: only runs/ outlives the hosts; choose a folder in it"),
        ([*tpu(), "--workdir", "gs://b/x"], "--workdir=gs://b/x: the workdir must be a folder that all"),
        ([*tpu(), "--config.workdir", "gs://b/x"], "--config.workdir=gs://b/x: the workdir must be a folder that all"),
        (tpu("--requeue=08", "--mount=h:/s"), "--requeue=08: expected an integer, 0 or more"),
        (
            [*tpu()[:-1], f"--config={runs.ROOT}/configs/base.py"],
            f"{runs.ROOT}/configs/base.py: the hosts have another path; give it relative to the project's folder",
        ),
        ([*tpu(), "a\nb"], "an argument contains a line break: 'a"),
        (["gke", "--name=a", "--type=v5litepod-16"], "--claim=: expected the name of a ReadWriteMany volume claim"),
        (["gke", "--name=a", "--type=v3-8"], "--type=v3-8: unknown slice type; expected v4-8"),
        (
            ["gke", "--name=a", "--type=v6e-8", "--claim=c", "--slices=2"],
            "--slices=2: GKE only joins slices with several hosts; v6e-8 has one host",
        ),
        (["slurm", "--gpus-per-node=0"], "--gpus-per-node=0: expected a number or TYPE:NUMBER; without GPUs use"),
        (["slurm", "--time=long"], "--time=long: expected [DAYS-]HOURS:MINUTES:SECONDS"),
        (
            ["slurm", "--python=no/python", "--", CONFIG],
            "no/python is not installed here; create the environment there, or set --py",
        ),
        ([*SLURM[:1], "--time=1:2:3:4", *SLURM[1:]], "--time=1:2:3:4: expected [DAYS-]HOURS:MINUTES:SECONDS"),
        (
            [*SLURM[:1], "--time=0:05:00", *SLURM[1:]],
            "--grace=300: expected fewer seconds than --time=0:05:00; otherwise every job would only save",
        ),
        (
            ["slurm", "--in-job", "py", CONFIG],
            "--in-job is internal: only SLURM uses it, in a GPU job that this script",
        ),
        (["local", "--port=65536", "--", CONFIG], "--port=65536: expected an integer, 65535 or less"),
        (["local", "--processes=0", "--", CONFIG], "--processes=0: expected an integer, 1 or more"),
        (["local", "--python=nopython", "--", CONFIG], "--python=nopython does not exist"),
    ],
)
def test_mistakes_are_one_sentence_and_call_nothing(launch, args, sentence):
    done = launch(*args)
    assert (done.code, done.out, done.called) == (2, "", [])
    assert done.err.startswith(f"error: {sentence}") and done.err.endswith("\n")


# ----------------------------------------------------------------------------------------------------------------------
# tpu_vm.sh


def test_one_slice(launch, tmp_path):
    done = launch(*tpu("--spot"))
    assert done.code == 0
    gcloud, everywhere = "gcloud compute tpus tpu-vm", "--zone=z --worker=all"
    assert done.called == [
        f"{gcloud} list --zone=z '--format=value(name.basename())'",
        f"{gcloud} create run-1 --zone=z --accelerator-type=v5litepod-8 --spot --version=v2-alpha-tpuv5-lite",
        f"{gcloud} scp {tmp_path}/run-1-z.tgz run-1: {everywhere}",
        f"{gcloud} ssh run-1 {everywhere} --ssh-flag=-oServerAliveInterval=60 "
        + shlex.quote(
            "--command=set -e; mkdir -p sparsecut_jax; tar -xzf run-1-z.tgz -C sparsecut_jax; cd sparsecut_jax;"
            " python3 -m pip install -q --user uv; ~/.local/bin/uv venv -q --python=3.12 .venv;"
            " ~/.local/bin/uv pip install -q --python=.venv/bin/python -r requirements.txt 'jax[tpu]'"
        ),
        f"{gcloud} ssh run-1 {everywhere} --ssh-flag=-oServerAliveInterval=60 "
        + shlex.quote(
            "--command=cd sparsecut_jax && exec nohup .venv/bin/python -u -m sparsecut_jax.train --require-platform=tpu "
            + CONFIG
        ),
        f"{gcloud} scp run-1:sparsecut_jax/runs runs/run-1.part --zone=z --worker=0 --recurse",
        "mv runs/run-1.part runs/run-1",
        f"{gcloud} delete run-1 --zone=z --quiet",
    ]
    assert done.err.endswith("launch: run-1 (1 x v5litepod-8 in z) was deleted\n")
    assert not (tmp_path / "run-1-z.tgz").exists()


def test_what_a_dry_run_prints_elsewhere_goes_to_the_project_first(tmp_path):
    command = [runs.ROOT / "launch/tpu_vm.sh", "--dry-run", *tpu()[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"cd {shlex.quote(str(runs.ROOT))}")


def test_the_copy_holds_the_tracked_files_that_a_run_needs(launch, tmp_path):
    launch(*tpu())
    names = subprocess.run(["tar", "-tzf", tmp_path / "log.tgz"], capture_output=True, text=True).stdout.split()
    assert {"requirements.txt", "configs/base.py", "sparsecut_jax/train.py", "sparsecut_jax/data/rows.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".git/", "runs/"))]
    assert (tmp_path / "log.tgz").stat().st_size < 1_000_000  # a ConfigMap holds a MiB


def test_two_slices_are_one_queued_resource(launch):
    done = launch(*TWO)
    assert done.code == 0
    short = [
        line.removeprefix("gcloud compute tpus queued-resources ").split(" --ssh-flag")[0].split(" /")[0]
        for line in done.called
    ]
    where = "--zone=z --project=p"
    everywhere = f"{where} --worker=all --node=all --batch-size=64"
    assert short == [
        f"list {where} '--format=value(name.basename())'",
        f"create run-1 {where} --accelerator-type=v5litepod-16 --spot --node-count=2 --node-prefix=run-1"
        " --runtime-version=v2-alpha-tpuv5-lite",
        f"describe run-1 {where} '--format=value(state.state)'",
        "scp",
        f"ssh run-1 {everywhere}",
        f"ssh run-1 {everywhere}",
        f"ssh run-1 {everywhere}",
        f"delete run-1 {where} --quiet --force",
    ]
    assert "sudo mount -t nfs nfs:/share sparsecut_jax/runs" in done.called[5]
    assert "sparsecut_jax.train" in done.called[6]


@pytest.mark.parametrize(
    ("type", "runtime"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-1", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_follows_from_the_type(launch, type, runtime):
    assert f" --version={runtime}\n" in launch(*tpu("--dry-run", type=type)).out
    assert " --version=mine\n" in launch(*tpu("--dry-run", "--version=mine", type=type)).out


@pytest.mark.parametrize(
    ("at", "step", "code"),
    [
        (" create ", "creating run-1", 1),
        (".tgz run-1:", "copying to run-1", 1),
        ("pip install", "installing on run-1", 255),
        ("sparsecut_jax.train", "the run on run-1", 4),
    ],
)
def test_after_a_failure_the_slice_is_deleted(launch, at, step, code):
    done = launch(*tpu(), FAIL_AT=at, FAIL_CODE=str(code), LISTED="run-1")
    assert done.code == 2 and "run-1 already exists in z" in done.err  # that is what LISTED says at the start
    done = launch(*tpu(), FAIL_AT=at, FAIL_CODE=str(code))
    assert done.code == code
    assert f"launch: {step} ended with exit code {code}\n" in done.err
    if at == " create ":
        assert done.called[-1].startswith("gcloud compute tpus tpu-vm list ")  # which does not know it
        assert done.err.endswith("launch: run-1 (1 x v5litepod-8 in z): nothing is left\n")
    else:
        assert done.called[-1] == "gcloud compute tpus tpu-vm delete run-1 --zone=z --quiet"
        assert done.err.endswith("launch: run-1 (1 x v5litepod-8 in z) was deleted\n")


def test_a_creation_that_gcloud_says_failed_may_have_left_something(launch, fakes):
    """A queued resource that is there after `create` has ended with an error is deleted."""
    gcloud = fakes / "gcloud"
    gcloud.write_text(FAKE.replace('  *" list', '  *" list "*) [[ ! -e $LOG.failed ]] || echo run-1 ;;\n  *" list'))
    done = launch(*tpu("--queued"), FAIL_AT=" create ", ONCE="1")
    assert done.code == 1
    assert done.called[-1] == "gcloud compute tpus queued-resources delete run-1 --zone=z --quiet --force"


def test_what_cannot_be_deleted_is_said_with_the_command(launch):
    delete = "gcloud compute tpus tpu-vm delete run-1 --zone=z --quiet"
    what = "launch: run-1 (1 x v5litepod-8 in z)"
    done = launch(*tpu(), FAIL_AT=" delete ")
    assert done.code == 1 and done.called[-1] == delete
    told = f"{what} was created, may still cost money, and could not be deleted; delete it with: {delete}\n"
    assert done.err.endswith(told)
    done = launch(*tpu("--keep"))
    assert done.code == 0 and delete not in done.called
    assert done.err.endswith(f"{what} still exists and costs money; delete it with: {delete}\n")


def test_results_that_cannot_be_copied_stay_where_they_are(launch):
    """A finished run is not deleted with its results, nor is its end called a success."""
    done = launch(*tpu(), FAIL_AT="scp run-1:")
    assert done.code == 1 and verbs(done)[-3:] == ["scp"] * 3
    delete = "gcloud compute tpus tpu-vm delete run-1 --zone=z --quiet"
    assert "launch: runs/ could not be copied from run-1\n" in done.err
    assert done.err.endswith(
        f"launch: run-1 (1 x v5litepod-8 in z) still exists and costs money; delete it with: {delete}\n"
    )
    assert verbs(launch(*tpu(), FAIL_AT="scp run-1:", ONCE="1"))[-2:] == ["mv", "delete"]


def test_results_go_beside_what_is_there(launch, tmp_path):
    name = f"test-{os.getpid()}"
    folder = runs.ROOT / "runs" / name
    folder.mkdir(parents=True)
    try:
        done = launch("tpu_vm", f"--name={name}", *tpu()[2:])
    finally:
        folder.rmdir()
    assert (done.code, done.called) == (2, [])
    assert done.err.startswith(f"error: runs/{name}, where the results would go, already exists; choose another")


def test_of_a_name_that_is_taken_nothing_is_touched(launch):
    done = launch(*tpu(), LISTED="run-10\nrun-1")
    assert (done.code, len(done.called)) == (2, 1)
    assert "error: run-1 already exists in z; choose another --name, or delete it with: gcloud compute" in done.err
    assert launch(*tpu(), LISTED="run-10").code == 0
    done = launch(*tpu(), FAIL_AT=" list ")
    assert (done.code, len(done.called)) == (1, 1)
    assert done.err.endswith("error: gcloud cannot list the resources in z; nothing was created\n")


def test_a_queue_that_gives_nothing(launch):
    done = launch(*tpu("--queued"), STATE="FAILED")
    assert done.code == 1
    assert "launch: Google says of run-1: FAILED\nlaunch: waiting for run-1 ended with exit code 1\n" in done.err
    assert done.called[-1] == "gcloud compute tpus queued-resources delete run-1 --zone=z --quiet --force"


def verbs(done: Ended) -> list[str]:
    return [(*line.split(), *[line.split()[0]] * 4)[4 * line.startswith("gcloud")] for line in done.called]


GO = ["create", "scp", "ssh", "ssh", "ssh"]  # copy, install, mount, train


@pytest.mark.parametrize(
    ("code", "state", "asked"), [("3", "READY", 0), ("255", "PREEMPTED", 1)], ids=["saved", "connection lost"]
)
def test_a_slice_that_was_taken_away_is_created_again(launch, code, state, asked):
    args = tpu("--spot", "--requeue=2", "--mount=h:/s")
    done = launch(*args, FAIL_AT="sparsecut_jax.train", FAIL_CODE=code, ONCE="1", STATE=state)
    assert done.code == 0
    assert verbs(done) == ["list", *GO, *["describe"] * asked, "delete", *GO, "delete"]
    assert "the slice was preempted; creating it again (1 of 2)" in done.err


@pytest.mark.parametrize(("code", "asked"), [("2", 0), ("4", 0), ("1", 4)])
def test_no_other_end_is_repeated(launch, code, asked):
    args = tpu("--spot", "--requeue=2", "--mount=h:/s")
    done = launch(*args, FAIL_AT="sparsecut_jax.train", FAIL_CODE=code, STATE="READY")
    assert done.code == int(code)
    assert verbs(done) == ["list", *GO, *["describe"] * asked, "delete"]


def test_it_is_created_again_only_so_often(launch):
    done = launch(*tpu("--requeue=2", "--mount=h:/s"), FAIL_AT="sparsecut_jax.train", FAIL_CODE="3")
    assert done.code == 3
    assert verbs(done) == ["list", *GO, "delete", *GO, "delete", *GO, "delete"]


@pytest.mark.parametrize(
    ("number", "code", "at"),
    [
        (signal.SIGINT, 130, "sparsecut_jax.train"),
        (signal.SIGTERM, 143, "sparsecut_jax.train"),
        (signal.SIGHUP, 143, "sparsecut_jax.train"),
        (signal.SIGINT, 130, " create "),
    ],
)
def test_who_stops_the_script_leaves_nothing(launch, start, tmp_path, number, code, at):
    process = start(f"launch/{tpu()[0]}.sh", *tpu()[1:], HANG_AT=at)
    wait_for(tmp_path / "log.hangs", process)
    began = time.monotonic()
    process.send_signal(number)
    done = launch.ended(process)
    assert (done.code, verbs(done)[-1]) == (code, "delete") and time.monotonic() - began < 10
    assert done.err.endswith("launch: run-1 (1 x v5litepod-8 in z) was deleted\n")


def test_the_queue_is_left_at_once(launch, start, tmp_path):
    """Also where the next look would be half a minute away."""
    process = start("launch/tpu_vm.sh", *tpu("--queued")[1:], STATE="WAITING_FOR_RESOURCES", LAUNCH_POLL="30")
    while " describe " not in ((tmp_path / "log").read_text() if (tmp_path / "log").exists() else "").replace(
        "\x1f", " "
    ):
        time.sleep(0.01)
    time.sleep(0.2)
    began = time.monotonic()
    process.terminate()
    done = launch.ended(process)
    assert (done.code, verbs(done)[-1]) == (143, "delete") and time.monotonic() - began < 10


@pytest.mark.parametrize("script", ["tpu_vm", "gke"])
def test_who_stops_reading_leaves_nothing(launch, start, script):
    """`... 2>&1 | tee log` and ^C, which ends tee too, or a terminal that is closed."""
    args = tpu() if script == "tpu_vm" else GKE
    done = launch.ended(start("bash", "-c", f"{shlex.join([f'launch/{script}.sh', *args[1:]])} 2>&1 | head -n 3"))
    assert len(done.out.splitlines()) == 3
    assert " delete " in done.called[-1] and sum(" delete " in line for line in done.called) == 1


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# gke.sh


def test_the_manifest_is_yaml_before_and_after_it_is_filled_in(launch, tmp_path):
    text = (runs.ROOT / "launch" / "gke.yaml").read_text()
    assert yaml.safe_load(text)["metadata"]["name"] == "${NAME}"
    done = launch(
        "gke",
        "--slices=2",
        "--type=v5p-32",
        *[arg for arg in GKE[1:] if "type" not in arg],
        "--config.x=a&'b'",
        "--config.y=",
    )
    assert done.code == 0
    filled = (tmp_path / "log.applied").read_text()
    assert "${" not in filled
    job = yaml.safe_load(filled)
    assert job["spec"]["failurePolicy"] == {
        "maxRestarts": 10,
        "rules": [{"name": "mendFirst", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (slices,) = job["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    spec = slices["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 0)
    rules = [{"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 4]}}]
    assert spec["podFailurePolicy"] == {"rules": rules}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 600
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
    (script,) = container["args"]
    last = script.splitlines()[-1]
    assert shlex.split(last)[1:] == [
        "python", "-u", "-m", "sparsecut_jax.train", "--require-platform=tpu", CONFIG, "--config.x=a&'b'", "--config.y=",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("type", "expected"),
    [("v5litepod-1", (1, "1", "1x1")), ("v6e-8", (1, "8", "2x4")), ("v6e-16", (4, "4", "4x4")),
     ("v4-8", (1, "4", "2x2x1")), ("v5p-384", (48, "4", "4x4x12"))],
)  # fmt: skip
def test_hosts_and_topology_of_a_type(launch, type, expected):
    out = launch("gke", "--name=a", f"--type={type}", "--claim=c", "--dry-run", "--", CONFIG).out
    spec = yaml.safe_load(out.split("<<'END'\n")[1].split("\nEND\n")[0])["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]
    pod = spec["template"]["spec"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert (spec["parallelism"], chips, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]) == expected


def test_gke(launch, tmp_path):
    done = launch(*GKE)
    assert done.code == 0
    first = (
        "jobset.sigs.k8s.io/jobset-name=run-1,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    )
    assert done.called == [
        "kubectl get jobset/run-1 configmap/run-1 --ignore-not-found --output=name",
        f"kubectl create configmap run-1 --from-file=code.tgz={tmp_path}/run-1.tgz",
        "kubectl apply --filename=-",
        f"kubectl logs --follow --selector={first} --since-time=2025-01-02T03:04:05Z",
        "kubectl get jobset/run-1 '--output=jsonpath={.status.terminalState}'",
        "kubectl delete jobset/run-1 configmap/run-1 --ignore-not-found",
    ]
    done = launch(*GKE, STATE="Failed", CODES="4")
    assert done.code == 4 and done.called[-1].startswith("kubectl delete ")
    assert launch(*GKE, STATE="Failed", CODES="").code == 1


@pytest.mark.parametrize("at", ["create configmap", " apply ", "terminalState"])
def test_gke_deletes_after_a_failure(launch, at):
    done = launch(*GKE, FAIL_AT=at)
    assert done.code == 1
    assert done.called[-1] == "kubectl delete jobset/run-1 configmap/run-1 --ignore-not-found"
    assert done.err.endswith("launch: run-1 (1 x v5litepod-16) was deleted\n")


def test_a_network_that_fails_for_a_while_ends_nothing(launch):
    done = launch(*GKE, FAIL_AT="terminalState", ONCE="1")
    assert done.code == 0 and [line for line in done.called if "terminalState" in line] == [done.called[4]] * 2
    done = launch(*tpu("--queued"), FAIL_AT=" describe ", ONCE="1")
    assert done.code == 0 and verbs(done)[:5] == [
        "list", "create", "describe", "describe", "scp",
    ]  # fmt: skip


def test_gke_touches_no_run_of_the_same_name(launch):
    done = launch(*GKE, LISTED="jobset.jobset.x-k8s.io/run-1")
    assert (done.code, len(done.called)) == (2, 1)
    assert "error: run-1 already exists; choose another --name, or delete it with: kubectl delete" in done.err


# ----------------------------------------------------------------------------------------------------------------------
# slurm.sh


def test_slurm_submits_itself(launch):
    done = launch(*SLURM)
    assert done.code == 0
    assert done.called == [
        "sbatch --job-name=sparsecut --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=16 --time=24:00:00"
        " --signal=TERM@300 --requeue --open-mode=append --partition=gpu launch/slurm.sh --in-job python3"
        f" {CONFIG} --config.llm.layers=2"
    ]


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_a_slurm_job_that_has_saved_goes_back_into_the_queue(launch, tmp_path, code):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_GPUS_PER_NODE": "a100:4", "SLURM_CPUS_PER_TASK": "16"}
    done = launch("slurm", "--in-job", "py", CONFIG, **slurm, FAIL_AT="srun", FAIL_CODE=str(code))
    assert done.code == code
    assert done.called == [
        "srun --cpus-per-task=16 --kill-on-bad-exit=0 --wait=0 py -u -m sparsecut_jax.train --require-platform=gpu "
        + CONFIG,
        *["squeue --noheader --format=%T --jobs=7", "scontrol requeue 7"] * (code == 3),
    ]
    assert (tmp_path / "log.devices").read_text() == "0,1,2,3\n"


def test_a_slurm_job_that_was_cancelled_stays_so(launch):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_GPUS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "16"}
    done = launch("slurm", "--in-job", "py", CONFIG, **slurm, FAIL_AT="srun", FAIL_CODE="3", STATE="COMPLETING")
    assert done.code == 3 and done.called[-1].startswith("squeue ")


# ----------------------------------------------------------------------------------------------------------------------
# local.sh, with a shell script as Python

PYTHON = r"""#!/bin/bash
printf '%s\x1f' "$@" >>"$LOG.$BASHPID"; echo >>"$LOG.$BASHPID"; cat "$LOG.$BASHPID" >>"$LOG"
[[ $* =~ --process=([0-9]) ]]; index=${BASH_REMATCH[1]}
codes=($CODES)
case ${codes[index]} in
  wait)
    trap 'exit 3' TERM; trap 'exit 130' INT
    touch "$LOG.up$index"
    for ((i = 0; i < 600; i++)); do sleep 0.02; done ;;
  *) exit "${codes[index]}" ;;
esac
"""


@pytest.fixture
def python(tmp_path) -> str:
    file = tmp_path / "python"
    file.write_text(PYTHON)
    file.chmod(0o755)
    return f"--python={file}"


def test_local_starts_every_process(launch, python):
    args = ["--processes=3", "--port=8476", python, "--", CONFIG, "--config.workdir=a b"]
    done = launch("local", *args, CODES="0 0 0")
    assert done.code == 0
    assert sorted(done.called) == [
        f"-m sparsecut_jax.train --coordinator=localhost:8476 --processes=3 --process={i} {CONFIG} '--config.workdir=a b'"
        for i in range(3)
    ]
    dry = launch("local", "--dry-run", *args)
    assert dry.called == [] and dry.err == ""
    prefix = f"{python.removeprefix('--python=')} "
    assert [line.removeprefix(prefix) for line in dry.out.splitlines()] == [f"{c} &" for c in sorted(done.called)] + [
        "wait"
    ]
    fake = launch("local", "--dry-run", "--devices=4", *args, XLA_FLAGS="--a").out.splitlines()[0]
    scheduler = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    flag = f"'XLA_FLAGS=--a --xla_force_host_platform_device_count=4 {scheduler}'"
    assert fake.startswith(f"env JAX_PLATFORMS=cpu {flag} {prefix}-m sparsecut_jax.train --coordinator")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("5 2 5", 2), ("3 3 3", 3), ("5 137 5", 137), ("0 5 0", 5), ("4 4 4", 4), ("1 2 4", 2), ("3 5 3", 5)],
)
def test_the_exit_code_is_of_the_one_that_failed(launch, python, codes, expected):
    assert launch("local", "--processes=3", "--port=1", python, "--", CONFIG, CODES=codes).code == expected


def test_the_others_do_not_wait_for_one_that_has_something_to_mend(launch, python):
    began = time.monotonic()
    done = launch("local", "--processes=3", "--port=1", python, "--", CONFIG, CODES="wait 2 wait")
    assert done.code == 2 and time.monotonic() - began < 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 3), (signal.SIGINT, 130)])
def test_local_passes_signals_on(start, python, tmp_path, number, code):
    process = start("launch/local.sh", "--port=1", python, "--", CONFIG, CODES="wait wait")
    for index in range(2):
        wait_for(tmp_path / f"log.up{index}", process)
    process.send_signal(number)
    assert runs.finish(process, 10)[0] == code


IN_TERMINAL = """import fcntl, os, sys, termios
os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"""


def test_local_stops_all_at_ctrl_c_in_a_terminal(fakes, python, tmp_path):
    """There the key goes to a process group, which the processes are not in."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, "launch/local.sh", "--port=1", python, "--", CONFIG],
        cwd=runs.ROOT, env={**os.environ, "LOG": str(tmp_path / "log"), "CODES": "wait wait"},
        stdin=side, stdout=side, stderr=side,
    )  # fmt: skip
    for index in range(2):
        wait_for(tmp_path / f"log.up{index}", process)
    time.sleep(0.3)
    os.write(main, b"\x03")
    try:
        assert process.wait(10) == 130
        assert not any(alive(int(file.suffix[1:])) for file in tmp_path.glob("log.[0-9]*"))
    finally:
        os.close(main)
        os.close(side)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# ----------------------------------------------------------------------------------------------------------------------
# --require-platform


def test_a_platform_that_is_not_there_is_refused():
    platforms.require(None)
    platforms.require("cpu")
    with pytest.raises(UserError) as caught:
        platforms.require("tpu")
    assert str(caught.value) == (
        f'--require-platform=tpu: JAX finds only {jax.device_count()} x cpu (cpu); install "jax[tpu]" and run on a TPU VM, '
        "which no other process may be using"
    )


def test_what_jax_says_of_missing_devices_is_a_sentence():
    error = RuntimeError(
        "Unable to initialize backend 'cuda': FAILED_PRECONDITION: No visible GPU devices. (set JAX_PLATFORMS='' to"
        " automatically choose an available backend)"
    )
    assert platforms.missing(error) == (
        "JAX_PLATFORMS=cpu asks for devices that JAX cannot use (FAILED_PRECONDITION: No visible GPU devices); set "
        "JAX_PLATFORMS=cpu, or unset JAX_PLATFORMS"
    )
    assert platforms.missing(RuntimeError("another")) is None
    assert platforms.missing(AssertionError()) is None


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path):
    train = ["train", f"{CONFIG}:smoke", f"--config.workdir={tmp_path}/run", "--require-platform=gpu"]
    assert runs.finish(runs.command(*train, JAX_PLATFORMS="cuda")) == (
        2,
        "",
        "error: --require-platform=gpu: JAX_PLATFORMS=cuda asks for devices that JAX cannot use (none found); install "
        '"jax[cuda13]", and see that nvidia-smi lists a GPU, or unset JAX_PLATFORMS\n',
    )
    assert not (tmp_path / "run").exists()
