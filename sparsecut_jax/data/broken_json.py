"""Says why a file is not valid JSON, in the words of Python's parser. Holds one value of the file in memory at a time."""

from __future__ import annotations

import json
import mmap
import re

from sparsecut_jax.types import UserError

WINDOW = 1 << 20  # bytes that are parsed at a time
LONGEST = 1 << 25  # of one value; a longer one is not a row
INSIDE = bytes(range(0x80, 0xC0))  # bytes that continue a character
SPACE = re.compile(r"[ \t\r\n]*")


class Fault(Exception):
    """The parser's message, and the byte of the file that it refers to."""

    def __init__(self, words: str, byte: int):
        self.words, self.byte = words, byte


class TooLong(Fault):
    """A value of more than LONGEST bytes, which is not checked."""


class _Scanner:
    """Values of the file one after the other, from byte `at` on."""

    def __init__(self, data: mmap.mmap | bytes, at: int):
        self.data, self.at, self.text, self.i = data, at, "", 0
        self._fill(WINDOW)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.i = SPACE.match(self.text, self.i).end()
            if self.i < len(self.text):
                return self.text[self.i]
            if self.whole:
                return ""
            if self.undecoded and not self.text:
                raise self.undecoded
            self._fill(WINDOW)

    def value(self, longest: int) -> object:
        """The next value. Raises Fault; TooLong if it does not end within `longest` bytes."""
        self.peek()
        size = WINDOW
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.i)
                if self.whole or end < len(self.text):
                    self.i = end
                    return value
                fault, sure = TooLong("a number without an end", self.byte(self.i)), False
            except json.JSONDecodeError as error:
                # An error close to the end of the window may be caused by the window.
                sure = not error.msg.startswith("Unterminated") and error.pos < len(self.text) - 64
                fault = Fault(error.msg, self.byte(error.pos))
            except (ValueError, RecursionError) as error:  # a number with too many digits, too many nested brackets
                raise Fault(str(error), self.byte(self.i)) from None
            if sure or self.whole:
                raise fault
            if self.undecoded:
                raise self.undecoded
            if size >= longest:
                raise TooLong(fault.words, fault.byte)
            size *= 4
            self._fill(size)

    def byte(self, i: int) -> int:
        """Byte in the file of character `i` of the window."""
        return self.at + len(self.text[:i].encode())

    def _fill(self, size: int) -> None:
        """Moves the window to the current position."""
        self.at, self.i = self.byte(self.i), 0
        raw, self.undecoded = self.data[self.at : self.at + size], None
        self.whole = self.at + size >= len(self.data)
        try:
            self.text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.text = raw[: error.start].decode("utf-8")
            if self.whole or error.start < len(raw) - 3:  # not a character cut by the window
                self.whole, place = False, self.at + error.start
                words = f"'utf-8' codec can't decode byte 0x{raw[error.start]:02x} in position {place}: {error.reason}"
                self.undecoded = Fault(words, -1)


def fault_of(data: mmap.mmap | bytes, begin: int, name: str, row: int = 0, at: int = -1) -> UserError | None:
    """Why a file is not a list of objects from byte `begin` on; None for an empty list.

    row, at: a row up to which everything is valid, and its first byte; -1: unknown.
    """
    try:
        scanner = _Scanner(data, begin if at < 0 else at)
        if at < 0 and scanner.peek() != "[":
            try:
                kind = type(scanner.value(4 * WINDOW)).__name__
            except TooLong as fault:
                if data[scanner.at : scanner.at + 1] != b"{":
                    raise fault from None
                return UserError(
                    f"data source {name!r}: expected a list of rows, got one object of {len(data):,} bytes"
                )
            if scanner.peek():
                raise Fault("Extra data", scanner.byte(scanner.i))
            return UserError(f"data source {name!r}: expected a list of rows, got {kind}")
        scanner.i += at < 0
        if scanner.peek() != "]":
            while True:
                value = scanner.value(LONGEST)
                if not isinstance(value, dict):
                    return UserError(f"{name} row {row}: expected an object, got {type(value).__name__}")
                if scanner.peek() != ",":
                    break
                scanner.i, row = scanner.i + 1, row + 1
            if scanner.peek() != "]":
                raise Fault("Expecting ',' delimiter", scanner.byte(scanner.i))
        scanner.i += 1
        if scanner.peek():
            raise Fault("Extra data", scanner.byte(scanner.i))
        return None
    except Fault as fault:
        where = f": {_place(data, begin, fault.byte)}" if fault.byte >= 0 else ""
        return UserError(f"data source {name!r} is not valid JSON: {fault.words}{where}")


def _place(data: mmap.mmap | bytes, begin: int, byte: int) -> str:
    """A byte as line, column and character."""
    blocks = lambda a, b: (data[i : min(i + WINDOW, b)] for i in range(a, b, WINDOW))
    characters = lambda a, b: sum(len(block.translate(None, INSIDE)) for block in blocks(a, b))
    lines = sum(block.count(b"\n") for block in blocks(begin, byte))
    line = max(begin, data.rfind(b"\n", begin, byte) + 1)
    return f"line {lines + 1} column {characters(line, byte) + 1} (char {characters(begin, byte)})"
