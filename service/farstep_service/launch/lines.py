"""Whole lines out of what a process writes, so that those of several processes do not run into each other."""

from __future__ import annotations

from typing import final

LONGEST_BYTES = 65_536
"""A line that is longer is cut."""


@final
class Lines:
    """Collect the bytes of one stream, and give them out line by line, without their ends.

    A progress bar writes over its own line again and again (`\\r`); what stood there at the line's end is the line.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that have become complete by more bytes."""
        *complete, rest = (self._rest + data).split(b"\n")
        rest = _last_writing(rest)
        while len(rest) > LONGEST_BYTES:
            complete.append(rest[:LONGEST_BYTES])
            rest = rest[LONGEST_BYTES:]
        self._rest = rest
        return [_last_writing(line).rstrip(b"\r") for line in complete]

    def end(self) -> list[bytes]:
        """Return the last line, if it had no end."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return [rest] if rest else []


def _last_writing(line: bytes) -> bytes:
    """Return what a terminal would show of a line, which may be written over once more: a last `\\r` stays."""
    return line[line.rfind(b"\r", 0, -1) + 1 :]
