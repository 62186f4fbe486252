"""The parent of one process of a multi-process run: waits for it and says why it ended.

When one process dies, XLA aborts all the others at once, with pages of output. So a child process does the work, its
stderr goes to a file, and its parent turns that into one sentence. The parent of the first process also serves this
sentence on the coordinator's port, for processes that only know that the coordinator does not answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from typing import IO, Any, NoReturn

GONE = 5  # exit code if another process of the run died
ALIKE = (0, 3, 4)  # exit codes that all processes share
LINGER = 5.0  # seconds that the first process waits for the others' messages, and they for its answer
QUESTION = b"sparsecut_jax: who is gone?\n"


def wait(child: int, me: Any, noise: IO[bytes], notes: IO[str], resumes: bool) -> NoReturn:
    """Waits for the child that does the work and exits with its code; if it was aborted, prints why.

    Args:
      child: its process id.
      me: a `hosts.Process`.
      noise: what libraries wrote to the child's stderr.
      notes: the child's messages to its parent, one JSON object per line.
      resumes: whether running the same command again resumes the work.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    notes.seek(0)
    noise.seek(max(0, noise.seek(0, os.SEEK_END) - 65536))
    known: dict[str, Any] = {}
    for line in notes:
        known |= json.loads(line)
    message, silent = known.get("last", ""), []
    message = message if code == GONE else f"{me.name} ended: {message}"
    if code < 0:
        again = "; run the same command on all hosts to resume from the last checkpoint" if resumes else ""
        code, message, silent = reason(-code, me, known, noise.read().decode(errors="replace"), again)
        print(message, file=sys.stderr, flush=True)
    if me.index == 0 and code not in ALIKE and "coordinator" in known:
        answer(address(known["coordinator"])[1], message, me.count - 1 - len(silent))
    os._exit(code)


def reason(number: int, me: Any, known: dict[str, Any], noise: str, again: str) -> tuple[int, str, list[int]]:
    """(exit code, sentence, indices of the processes that died), after signal `number` ended the child."""
    if number != signal.SIGABRT:
        want = " (often: out of memory)" if number == signal.SIGKILL else ""
        return 128 + number, f"{me.name} was killed by {signal.Signals(number).name}{want}{again}", []
    names = known.get("names")
    if names is None:
        what = f"not all {me.count} processes connected within {me.join_timeout} s; start the missing ones"
        if "ALREADY_EXISTS" in noise:
            what = f"another process also has --process={me.index}; expected every index once"
        if "Unexpected task" in noise:
            what = f"process 0 was started with a smaller --processes than {me.count}; expected the same number for all"
        return 2, f"{me.name}: error: {what}", []
    if found := re.search(r"stopped sending heartbeats\):\s+(\d+(?:\s+\d+)*)", noise):
        silent = sorted({int(i) for i in found[1].split()})
        return GONE, f"{' and '.join(names[i] for i in silent)} died{again}", silent
    if found := re.search(r"(\d+) unexpectedly tried to connect", noise):
        return GONE, f"{names[int(found[1])]} was started a second time{again}", []
    if me.index and "CoordinationService/" in noise:
        return GONE, ask(*address(known["coordinator"])) or f"{names[0]} died{again}", [0]
    print(noise, file=sys.stderr)
    return 128 + number, f"{me.name} was aborted", []


def address(coordinator: str) -> tuple[str, int]:
    """Splits "HOST:PORT" into host and port."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def listen(port: int) -> socket.socket:
    """A server socket on all addresses of this host. Raises OSError if the port is taken."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def answer(port: int, told: str, others: int) -> None:
    """Sends `told` to `others` processes, or to as many as ask within LINGER seconds."""
    until = time.monotonic() + LINGER
    with contextlib.suppress(OSError), listen(port) as server:
        while others > 0 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with server.accept()[0] as asking, contextlib.suppress(OSError):
                asking.settimeout(0.5)
                if asking.recv(len(QUESTION)) == QUESTION:  # rather than a JAX client that reconnects
                    asking.sendall(told.encode())
                    others -= 1


def ask(host: str, port: int) -> str:
    """The sentence that `answer` serves on the first process's host; empty if nothing answers."""
    until = time.monotonic() + LINGER
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as server:
            server.sendall(QUESTION)
            if told := server.makefile().read():
                return told
        time.sleep(0.1)
    return ""
