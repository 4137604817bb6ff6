"""The output of a run: each line of each process under its name and, on a terminal, one line of progress below them.

Lines are bytes and stay as they are, colours and broken UTF-8 included. rich draws the line of progress and moves it
down when a line is written above it. Where the standard error is no terminal, rich has no part in the output.
"""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass
from typing import IO, cast, final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from farstep_service.launch.children import Stream

FILES: dict[Stream, int] = {"stdout": 1, "stderr": 2}
USUAL_COLUMNS = 80
ENCODING = ("utf-8", "surrogateescape")
"""Takes any bytes through rich's text, and gives the same bytes back."""


@final
class Output:
    """Write bytes to a descriptor, or text as rich does.

    A closed terminal takes nothing more, and does not end the run: the SIGHUP that comes with it decides that. A
    descriptor that another process has made non-blocking is waited for.

    Args:
        descriptor: where the bytes go.

    Attributes:
        closed: whether the terminal was closed.
    """

    encoding = ENCODING[0]

    def __init__(self, descriptor: int) -> None:
        self.closed = False
        self._descriptor = descriptor

    def send(self, data: bytes) -> None:
        """Write all of the bytes."""
        while data and not self.closed:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self.closed = True

    def write(self, text: str) -> int:
        """Write text that rich has rendered."""
        self.send(text.encode(*ENCODING))
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""


@dataclass(frozen=True, slots=True)
class _Verbatim:
    """A line that rich writes as it is: not wrapped, cropped or searched for markup."""

    line: bytes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.line.decode(*ENCODING))


@final
class Terminal:
    """Write whole lines, each at once, to the standard output and the standard error.

    Args:
        names: of the processes; lines are aligned behind the longest.
        to: the file descriptor of each stream.
    """

    def __init__(self, names: list[str], to: dict[Stream, int] | None = None) -> None:
        to = FILES if to is None else to
        self._width = max(map(len, names))
        self._outputs = {stream: Output(descriptor) for stream, descriptor in to.items()}
        self._above: set[Stream] = {stream for stream in to if _same_terminal(to[stream], to["stderr"])}
        self._live: Live | None = None
        if self._above:
            console = Console(
                file=cast("IO[str]", self._outputs["stderr"]), force_terminal=True, force_interactive=True
            )
            if not console.is_dumb_terminal:
                self._live = Live(
                    console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
                )
        self._descriptor = to["stderr"]
        self._shown: tuple[str, int] | None = None

    @property
    def live(self) -> bool:
        """Return whether the run has a line of progress: its standard error is a terminal, and still open."""
        return self._live is not None and not self._outputs["stderr"].closed

    def line(self, name: str, stream: Stream, line: bytes) -> None:
        """Write a line of a process."""
        line = name.ljust(self._width).encode() + b" | " + line + b"\n"
        if self._live is not None and self._live.is_started and stream in self._above:
            self._live.console.print(_Verbatim(line), soft_wrap=True, end="")
        else:
            self._outputs[stream].send(line)

    def progress(self, text: str) -> None:
        """Show a text as the line of progress, cropped to the terminal's width; "" removes the line."""
        if self._live is None:
            return
        if not text:
            self._live.stop()
            self._shown = None
        elif (text, columns := self._columns()) != self._shown:
            self._shown = text, columns
            self._live.console.width = columns
            self._live.update(Text(text, no_wrap=True, overflow="crop", end=""))
            if not self._live.is_started:
                self._live.start()
                self._live.console.show_cursor()  # rich hides it, and a killed launch could not bring it back
            self._live.refresh()

    def _columns(self) -> int:
        """Return the width of the terminal that is written to; rich asks the standard input first."""
        try:
            return os.get_terminal_size(self._descriptor).columns or USUAL_COLUMNS
        except OSError:  # it was closed; the next write notices that, too
            return USUAL_COLUMNS


def _same_terminal(one: int, other: int) -> bool:
    """Return whether two descriptors are the same terminal."""
    return os.isatty(one) and os.isatty(other) and os.fstat(one).st_rdev == os.fstat(other).st_rdev
