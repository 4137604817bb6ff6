"""What a person sees: every line of every process under its name and, on a terminal, one line of progress below."""

from __future__ import annotations

import errno
import os
import select
from typing import final

from farstep_service.launch.children import Stream

CLEAR = b"\r\x1b[K"
USUAL_COLUMNS = 80
FILES: dict[Stream, int] = {"stdout": 1, "stderr": 2}


@final
class Terminal:
    """Write whole lines, each at once, to the standard output and the standard error.

    A terminal that was closed takes nothing more, and is no reason to end: whether the run goes on is for the SIGHUP
    that comes with it.

    Args:
        names: of the processes; lines stand under each other.
        to: the file descriptor of each stream.

    Attributes:
        live: whether there is a line of progress: the standard error is a terminal, and is still there.
    """

    def __init__(self, names: list[str], to: dict[Stream, int] | None = None) -> None:
        self._width = max(map(len, names))
        self._to = FILES if to is None else to
        self.live = os.isatty(self._to["stderr"])
        self._progress = b""
        self._closed: set[int] = set()

    def line(self, name: str, stream: Stream, line: bytes) -> None:
        """Write a line of a process."""
        self._clear()
        self._write(self._to[stream], name.ljust(self._width).encode() + b" | " + line + b"\n")
        self._draw()

    def progress(self, text: str) -> None:
        """Put a text in the place of the line of progress, "" for none; nothing happens where that cannot be."""
        if not self.live:
            return
        columns = self._columns()
        shown = text[: columns - 1].encode()
        if shown != self._progress:
            self._clear()
            self._progress = shown
            self._draw()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._to["stderr"]).columns or USUAL_COLUMNS
        except OSError:  # it was closed; the next writing finds that, too
            return USUAL_COLUMNS

    def _clear(self) -> None:
        if self._progress:
            self._write(self._to["stderr"], CLEAR)

    def _draw(self) -> None:
        if self._progress:
            self._write(self._to["stderr"], self._progress)

    def _write(self, to: int, data: bytes) -> None:
        while data and to not in self._closed:
            try:
                data = data[os.write(to, data) :]
            except BlockingIOError:  # whoever shares it has said that writes shall not wait
                select.select([], [to], [])
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self._closed.add(to)
                self.live = self.live and to != self._to["stderr"]
