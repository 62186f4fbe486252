"""Shows how far a command is: a progress bar, a line that counts seconds, and the times of a start."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


TICK = 1.0  # seconds between updates of a counter on a terminal


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every `seconds`, so that log files stay readable."""

    def __init__(self, total: int, initial: int, name: str, seconds: float = 15.0):
        self.total, self.done, self.name, self.seconds = total, initial, name, seconds
        self.initial, self.text, self.started = initial, "", time.monotonic()
        self.shown = self.steady = self.started
        terminal = sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
        form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self.bar = tqdm(total=total, initial=initial, desc=name, file=sys.stdout, bar_format=form) if terminal else None

    def update(self, n: int = 1) -> None:
        first = self.done == self.initial
        if first:  # it included the compilation and would distort the others
            self.steady = time.monotonic()
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif first and self.text or time.monotonic() - self.shown >= self.seconds or self.done == self.total:
            self._line()

    def note(self, text: str) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def write(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        self.bar.write(text, file=sys.stdout) if self.bar is not None else print(text, flush=True)

    def busy(self, what: str) -> contextlib.AbstractContextManager[list[str]]:
        """As the function `busy`; on a terminal the seconds are counted after the bar."""
        if self.bar is None:
            return busy(what, sys.stdout)
        return _counting(what, lambda text: self.bar.set_postfix_str(text or self.text), self.write)

    def awaiting(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; while waiting for the first one, shows `what` is being waited for."""
        items = iter(items)
        with self.busy(what):
            first = list(itertools.islice(items, 1))
        yield from itertools.chain(first, items)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line(self) -> None:
        self.shown = time.monotonic()
        steps = self.done - self.initial - 1
        pace = (self.shown - self.steady) / steps if steps > 0 else 0.0
        left = f", {pace * (self.total - self.done):.0f}s left" if steps > 0 else ""
        print(f"{self.name} {self.done}/{self.total} [{self.shown - self.started:.0f}s{left}] {self.text}", flush=True)


def busy(what: str, file: IO[str]) -> contextlib.AbstractContextManager[list[str]]:
    """Shows what a block does: on a terminal a line that counts the seconds, elsewhere a line at its start.

    Both end with a line that has the seconds and the remarks that the block appended to the list it was given.
    """
    tell = lambda text: print(text, file=file, flush=True)
    if not file.isatty():
        tell(f"{what} ...")
        return _counting(what, None, tell)
    clear = "\r\x1b[K"
    return _counting(what, lambda text: print(clear + text, end="", file=file, flush=True), tell)


@contextlib.contextmanager
def _counting(what: str, show: Callable[[str], None] | None, tell: Callable[[str], None]) -> Iterator[list[str]]:
    """Calls `show` every second, and with an empty text at the end; calls `tell` after a block that did not fail."""
    began, ended, remarks = time.monotonic(), threading.Event(), []
    seconds = lambda: time.monotonic() - began

    def count() -> None:
        while not ended.wait(TICK):
            show(f"{what} ... {seconds():.0f} s")

    counter = threading.Thread(target=count, daemon=True) if show else None
    if counter:
        show(f"{what} ...")
        counter.start()
    try:
        yield remarks
    finally:
        ended.set()
        if counter:
            counter.join()
            show("")
    tell(", ".join([f"{what}: {seconds():.1f} s", *remarks]))


class Startup:
    """Seconds from the start of the process to the end of its first step, by phase."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = _process_start()

    def done(self, part: str) -> None:
        """Counts the time since the last call as `part`."""
        now = time.time()
        self.parts[part], self._last = now - self._last, now

    def text(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"started in {sum(self.parts.values()):.1f} s: {parts}"


def _process_start() -> float:
    """Start of the process as time.time(); the current time if the system does not tell."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since boot
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()
