"""What is said when the process that does the work has been ended."""

import signal
import socket
import threading
import time

import pytest

from sparsecut_jax.runtime import watch
from sparsecut_jax.runtime.hosts import Process

NAMES = [f"process {i} of 3 (host h{i}, pid {i})" for i in range(3)]
KNOWN = {"names": NAMES, "coordinator": "127.0.0.1:1"}
SILENT = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe tasks have crashed."
LEADER = "Failed to send RPC [...] while calling /xla.coordination.CoordinationService/PollForError:"


def me(index: int) -> Process:
    return Process(index, 3, "127.0.0.1:1", 30, 60, NAMES[index])


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("number", "noise", "code", "sentence", "silent"),
    [
        (signal.SIGABRT, SILENT.format("1"), 5, f"{NAMES[1]} died; again", [1]),
        (signal.SIGABRT, SILENT.format("2\n1"), 5, f"{NAMES[1]} and {NAMES[2]} died; again", [1, 2]),
        (signal.SIGABRT, "ABORTED: 1 unexpectedly tried to connect with a different incarnation.", 5,
         f"{NAMES[1]} was started a second time; again", []),
        (signal.SIGKILL, "", 137, f"{NAMES[0]} was killed by SIGKILL (often: out of memory); again", []),
        (signal.SIGSEGV, "", 139, f"{NAMES[0]} was killed by SIGSEGV; again", []),
    ],
)  # fmt: skip
def test_the_reason_in_the_first_process(number, noise, code, sentence, silent):
    assert watch.reason(number, me(0), KNOWN, noise, "; again") == (code, sentence, silent)


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        ("DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask",
         "not all 3 processes connected within 30 s; start the missing ones"),
        ("ALREADY_EXISTS: Aborted connect attempt as there is a request from a newer incarnation.",
         "another process also has --process=1; expected every index once"),
        ("INVALID_ARGUMENT: Unexpected task registered with task=1",
         "process 0 was started with a smaller --processes than 3; expected the same number for all"),
    ],
)  # fmt: skip
def test_the_reason_before_all_have_met(noise, sentence):
    found = watch.reason(signal.SIGABRT, me(1), {}, noise, "; again")
    assert found == (2, f"{NAMES[1]}: error: {sentence}", [])


def test_other_aborts_show_what_was_written(capsys):
    found = watch.reason(signal.SIGABRT, me(0), KNOWN, "Check failed: x > 0\n", "; again")
    assert found == (134, f"{NAMES[0]} was aborted", [])
    assert capsys.readouterr().err == "Check failed: x > 0\n\n"


def test_who_only_knows_that_the_coordinator_is_silent_asks(monkeypatch):
    """A client of JAX's that tries again at the same port gets no answer, and takes nobody's."""
    monkeypatch.setattr(watch, "LINGER", 5.0)
    port = free_port()
    answering = threading.Thread(target=watch.answer, args=(port, f"{NAMES[2]} died", 1))
    answering.start()
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                break
        except OSError:
            time.sleep(0.01)
    known = {**KNOWN, "coordinator": f"127.0.0.1:{port}"}
    assert watch.reason(signal.SIGABRT, me(1), known, LEADER, "; again") == (5, f"{NAMES[2]} died", [0])
    answering.join(1)
    assert not answering.is_alive()


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(watch, "LINGER", 0.3)
    known = {**KNOWN, "coordinator": f"127.0.0.1:{free_port()}"}
    assert watch.reason(signal.SIGABRT, me(1), known, LEADER, "; again") == (5, f"{NAMES[0]} died; again", [0])
    watch.answer(free_port(), "nobody asks", 2)


@pytest.mark.parametrize(("text", "found"), [("h:1", ("h", 1)), ("[::1]:8476", ("::1", 8476))])
def test_address(text, found):
    assert watch.address(text) == found
