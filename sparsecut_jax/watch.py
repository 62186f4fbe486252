"""What waits for one of several processes, and says why it has ended.

When one of the processes is gone XLA aborts all others, whatever Python is at, with pages about it. So a child does the
work, its pages go to a file, and here they become one sentence. Who waits for the first process also tells it, at the
coordinator's port, to those who only know that the coordinator does not answer.
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

GONE = 5  # exit code where another process of the run is gone
ALIKE = (0, 3, 4)  # exit codes with which all processes end
LINGER = 5.0  # seconds that the first process waits for what the others have to say, and they for its answer
QUESTION = b"sparsecut_jax: who is gone?\n"


def wait(child: int, me: Any, noise: IO[bytes], notes: IO[str], resumes: bool) -> NoReturn:
    """Waits for the process that does the work, and ends as it did; where it was aborted, says why.

    Args:
      me: a `hosts.Process`.
      noise: what libraries have written to its stderr.
      notes: what it has left for us, a JSON object a line.
      resumes: the same command, given again, goes on where it was interrupted.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    notes.seek(0)
    noise.seek(max(0, noise.seek(0, os.SEEK_END) - 65536))
    known: dict[str, Any] = {}
    for line in notes:
        known |= json.loads(line)
    told, silent = known.get("last", ""), []
    told = told if code == GONE else f"{me.name} has ended: {told}"
    if code < 0:
        again = "; the same command on all hosts goes on from the last checkpoint" if resumes else ""
        code, told, silent = reason(-code, me, known, noise.read().decode(errors="replace"), again)
        print(told, file=sys.stderr, flush=True)
    if me.index == 0 and code not in ALIKE and "coordinator" in known:
        answer(address(known["coordinator"])[1], told, me.count - 1 - len(silent))
    os._exit(code)


def reason(number: int, me: Any, known: dict[str, Any], noise: str, again: str) -> tuple[int, str, list[int]]:
    """Exit code, sentence, and which processes are gone, after signal `number` has ended the child."""
    if number != signal.SIGABRT:
        want = " (often for want of memory)" if number == signal.SIGKILL else ""
        return 128 + number, f"{me.name} was ended by {signal.Signals(number).name}{want}{again}", []
    names = known.get("names")
    if names is None:
        what = f"not all of the {me.count} processes have come within {me.join_timeout} s; start those that are missing"
        if "ALREADY_EXISTS" in noise:
            what = f"another process has come with --process={me.index} as well; expected every index once"
        if "Unexpected task" in noise:
            what = f"process 0 was started with fewer than --processes={me.count}; expected the same for all"
        return 2, f"{me.name}: error: {what}", []
    if found := re.search(r"stopped sending heartbeats\):\s+(\d+(?:\s+\d+)*)", noise):
        silent = sorted({int(i) for i in found[1].split()})
        verb = "are" if silent[1:] else "is"
        return GONE, f"{' and '.join(names[i] for i in silent)} {verb} gone{again}", silent
    if found := re.search(r"(\d+) unexpectedly tried to connect", noise):
        return GONE, f"{names[int(found[1])]} was started a second time{again}", []
    if me.index and "CoordinationService/" in noise:
        return GONE, ask(*address(known["coordinator"])) or f"{names[0]} is gone{again}", [0]
    print(noise, file=sys.stderr)
    return 128 + number, f"{me.name} was aborted", []


def address(coordinator: str) -> tuple[str, int]:
    """ "HOST:PORT" -> both."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def listen(port: int) -> socket.socket:
    """A server on all addresses of this host. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def answer(port: int, told: str, others: int) -> None:
    """Tells it to `others` processes, or as many as ask in time."""
    until = time.monotonic() + LINGER
    with contextlib.suppress(OSError), listen(port) as server:
        while others > 0 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with server.accept()[0] as asking, contextlib.suppress(OSError):
                asking.settimeout(0.5)
                if asking.recv(len(QUESTION)) == QUESTION:  # and not a client of JAX's that tries again
                    asking.sendall(told.encode())
                    others -= 1


def ask(host: str, port: int) -> str:
    """What `answer` tells on the first process's host; empty if nobody is there."""
    until = time.monotonic() + LINGER
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as server:
            server.sendall(QUESTION)
            if told := server.makefile().read():
                return told
        time.sleep(0.1)
    return ""
