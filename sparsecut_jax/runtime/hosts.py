"""Multi-process runs: how the processes connect, exchange text without devices, and end together.

Each of them consists of two system processes: a child does the work, and the one that the user started waits for it
(watch.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from sparsecut_jax.runtime import watch
from sparsecut_jax.types import UserError

CLUSTERS = ("gcetpu", "gketpu", "slurm", "ompi")  # where JAX finds the other processes itself
STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL|UNKNOWN|FAILED_PRECONDITION): ")


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of the run. coordinator: HOST:PORT of process 0, None if JAX finds it; timeouts are in seconds."""

    index: int
    count: int
    coordinator: str | None
    join_timeout: int
    heartbeat_timeout: int
    name: str = ""


_me: Process | None = None  # None: a single-process run
_notes: IO[str] | None = None  # messages to the waiting parent


def define_flags() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 in a multi-process run; any free port there.")
    flags.DEFINE_integer("processes", None, "Number of processes of the run; 1: do not look for others.")
    flags.DEFINE_integer("process", None, "Index of this process, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds within which all processes must connect.", lower_bound=1)
    flags.DEFINE_integer("heartbeat_timeout", 60, "Seconds after which a silent process counts as dead.", lower_bound=5)


# ----------------------------------------------------------------------------------------------------------------------
# connecting


def start(resumes: bool, debug: bool) -> None:
    """Connects to the other processes before any device is used; does nothing in a single-process run.

    Args:
      resumes: whether running the same command again resumes the work.
      debug: show what libraries write to stderr.

    Raises:
      UserError: inconsistent flags, or the coordinator does not answer.
    """
    global _me, _notes
    process = _asked() or _found()
    if process is None or process.count == 1:
        return
    name = f"process {process.index} of {process.count} (host {socket.gethostname()}, pid {os.getpid()})"
    me = dataclasses.replace(process, name=name)
    noise, notes = tempfile.TemporaryFile(), tempfile.TemporaryFile("w+")  # noqa: SIM115 - open for the whole run
    ended, alive = os.pipe()  # closing it tells the child that its parent died
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(ended)
        watch.wait(child, me, noise, notes, resumes)
    os.close(alive)
    os.setpgid(0, 0)  # ^C reaches the waiting parent, which passes it on
    threading.Thread(target=lambda: os.read(ended, 1) or os._exit(1), daemon=True).start()
    _me, _notes, sys.excepthook = me, notes, _uncaught
    _redirect(None if debug else noise)
    explicit = {}
    if me.coordinator:
        _check_coordinator(me, *watch.address(me.coordinator))
        explicit = dict(coordinator_address=me.coordinator, num_processes=me.count, process_id=me.index)
    jax.distributed.initialize(
        **explicit, initialization_timeout=me.join_timeout, heartbeat_timeout_seconds=me.heartbeat_timeout
    )
    tell(f"name {me.index}", me.name)
    _note(names=[hear(f"name {i}") for i in range(me.count)], coordinator=_state().coordinator_address)
    # Gloo gives processes half a minute to connect; do it here, where none is delayed by compiling or reading.
    multihost_utils.sync_global_devices("start")


def _asked() -> Process | None:
    """The process according to flags or JAX's environment variables; None if neither is set."""
    names = {"coordinator": "COORDINATOR_ADDRESS", "processes": "NUM_PROCESSES", "process": "PROCESS_ID"}
    given = {flag: os.environ.get(f"JAX_{variable}") for flag, variable in names.items()}
    given |= {flag: flags.FLAGS[flag].value for flag in names if flags.FLAGS[flag].value is not None}
    given = {flag: value for flag, value in given.items() if value is not None}
    if not given:
        return None
    try:
        index, count = int(given.get("process", 0)), int(given.get("processes", 1))
    except ValueError as error:
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers: {error}") from error
    times = (flags.FLAGS.join_timeout, flags.FLAGS.heartbeat_timeout)
    if given.keys() == {"processes"} and count == 1:
        return Process(0, 1, None, *times)
    if missing := [name for name in names if name not in given]:
        raise UserError(
            f"--{next(iter(given))} needs --{missing[0]} too; a multi-process run is started with "
            "--coordinator=HOST:PORT --processes=N --process=I, where I is 0 to N-1"
        )
    if count < 1:
        raise UserError(f"--processes={count}: expected at least 1")
    if not 0 <= index < count:
        raise UserError(f"--process={index} of --processes={count}: expected 0 to {count - 1}")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={given['coordinator']!r}: expected HOST:PORT, for example 10.0.0.1:8476")
    return Process(index, count, given["coordinator"], *times)


def _found() -> Process | None:
    """The process according to the TPU slice, SLURM or Open MPI; None elsewhere."""
    from jax._src.clusters import ClusterEnv

    try:
        for kind in ClusterEnv._cluster_types:
            if kind.name in CLUSTERS and kind.is_env_present():
                times = (flags.FLAGS.join_timeout, flags.FLAGS.heartbeat_timeout)
                return Process(kind.get_process_id(), kind.get_process_count(), None, *times)
    except Exception as error:  # a cluster's own services may fail in any way
        raise UserError(
            f"the other processes cannot be found ({type(error).__name__}: {error}); set --processes=1, or "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    return None


def _check_coordinator(me: Process, host: str, port: int) -> None:
    """Raises UserError if the coordinator does not answer in time or, in process 0, if its port is taken."""
    if me.index == 0:
        try:
            watch.listen(port).close()
        except OSError as error:
            raise UserError(
                f"port {port} of --coordinator={me.coordinator} cannot be used ({os.strerror(error.errno)}); choose another one"
            ) from error
    reach = (
        socket.getaddrinfo if me.index == 0 else lambda host, port: socket.create_connection((host, port), 5).close()
    )
    until = time.monotonic() + me.join_timeout
    while True:
        try:
            reach(host, port)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--coordinator={me.coordinator} did not answer within {me.join_timeout} s "
                    f"({error.strerror or error}); start process 0 on that host, with the same address"
                ) from error
        time.sleep(0.2)


def _redirect(noise: IO[bytes] | None) -> None:
    """Only the first process prints; what C++ libraries write to stderr goes to `noise`."""
    out, err, null = os.dup(1), os.dup(2), os.open(os.devnull, os.O_WRONLY)
    how = dict(mode="w", buffering=1, errors="backslashreplace")
    sys.stdout = open(out if first() else null, **how)  # noqa: SIM115 - open for the whole run
    os.dup2(null, 1)
    if noise is not None:
        sys.stderr = open(err, **how)  # noqa: SIM115 - open for the whole run
        os.dup2(noise.fileno(), 2)


# ----------------------------------------------------------------------------------------------------------------------
# during the run


def several() -> bool:
    """Whether this is a multi-process run."""
    return _me is not None


def index() -> int:
    """Index of this process; 0 in a single-process run."""
    return _me.index if _me else 0


def first() -> bool:
    """Whether this is process 0, which prints and writes the shared files."""
    return index() == 0


def name() -> str:
    """For example "process 1 of 2 (host build-7, pid 4242)"; empty in a single-process run."""
    return _me.name if _me else ""


def tell(key: str, text: str) -> None:
    """Publishes a text under `key` for the other processes to `hear`."""
    if _me:
        _state().client.key_value_set(f"sparsecut_jax/{key}", text)


def hear(key: str) -> str:
    """The text that another process published under `key`. Waits for it without limit; no device is involved."""
    while True:
        try:
            return _state().client.blocking_key_value_get(f"sparsecut_jax/{key}", 5000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


@contextlib.contextmanager
def in_turn(key: str) -> Iterator[None]:
    """Process 0 runs the block first; then the others do, and find what it wrote."""
    if not first():
        hear(key)
    yield
    if first():
        tell(key, "")


def _state() -> Any:
    from jax._src import distributed  # the key-value store has no public API

    return distributed.global_state


# ----------------------------------------------------------------------------------------------------------------------
# ending


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Delays an error in the block that another process's death may have caused until the cause is known.

    Either that process has published why it ended, or XLA notices its silence and aborts this one.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while _me and cause is not None:
            if STATUS.search(str(cause)):
                _await_verdict(time.monotonic() + _me.heartbeat_timeout + watch.LINGER)
            cause = cause.__cause__ or cause.__context__
        raise


def _await_verdict(until: float) -> None:
    while time.monotonic() < until:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for _, sentence in _state().client.key_value_dir_get("sparsecut_jax/ended/"):
                print(sentence, file=sys.stderr, flush=True)
                leave(watch.GONE, sentence)
        time.sleep(0.2)


def leave(code: int, sentence: str) -> None:
    """Exits a process of a multi-process run after an error that the others may not have; returns in a single one."""
    if _me is None or code in watch.ALIKE:
        return
    _note(last=sentence)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != watch.GONE:
        with contextlib.suppress(Exception):  # the key-value store may not exist yet, or no longer
            tell(f"ended/{_me.index}", f"{_me.name} ended: {sentence}")
    if first():
        time.sleep(watch.LINGER)  # others failing for the same reason can report it while the coordinator still runs
    os._exit(code)  # a normal exit would make JAX wait for the others


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.__excepthook__(kind, error, trace)
    leave(1, f"{kind.__name__}: {error}".splitlines()[0])


def _note(**values: Any) -> None:
    _notes.write(json.dumps(values) + "\n")
    _notes.flush()
