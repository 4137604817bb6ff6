"""What a person sees: every line of every process under its name and, on a terminal, one line of progress below."""

from __future__ import annotations

import os
from typing import final

from farstep_service.launch.children import Stream

CLEAR = b"\r\x1b[K"
FILES: dict[Stream, int] = {"stdout": 1, "stderr": 2}


@final
class Terminal:
    """Write whole lines, each at once, to the standard output and the standard error.

    Args:
        names: of the processes; lines stand under each other.
        to: the file descriptor of each stream.

    Attributes:
        live: whether there is a line of progress: the standard error is a terminal.
    """

    def __init__(self, names: list[str], to: dict[Stream, int] | None = None) -> None:
        self._width = max(map(len, names))
        self._to = FILES if to is None else to
        self.live = os.isatty(self._to["stderr"])
        self._progress = b""

    def line(self, name: str, stream: Stream, line: bytes) -> None:
        """Write a line of a process."""
        self._clear()
        _write(self._to[stream], name.ljust(self._width).encode() + b" | " + line + b"\n")
        self._draw()

    def progress(self, text: str) -> None:
        """Put a text in the place of the line of progress, "" for none; nothing happens where that cannot be."""
        if not self.live:
            return
        columns = os.get_terminal_size(self._to["stderr"]).columns or 80
        shown = text[: columns - 1].encode()
        if shown != self._progress:
            self._clear()
            self._progress = shown
            self._draw()

    def _clear(self) -> None:
        if self._progress:
            _write(self._to["stderr"], CLEAR)

    def _draw(self) -> None:
        if self._progress:
            _write(self._to["stderr"], self._progress)


def _write(to: int, data: bytes) -> None:
    while data:
        data = data[os.write(to, data) :]
