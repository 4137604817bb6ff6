"""Processes of this one: started, heard, signalled, and none of them left behind.

Each is the leader of a group of its own, so that Ctrl-C reaches the launcher alone, which hands it on, and so that what
a worker started (loaders of data) ends with it. One loop waits for everything there is to wait for: what they write,
their ends, and signals. Nobody polls.

Whole lines out of what a process writes, so that those of several processes do not run into each other.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Literal, cast, final

from farstep.errors import InvalidOption
from farstep_service.launch.die_with_parent import Watcher, dying_with_parent, watched

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


Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")
CHUNK_BYTES = 65_536
HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Said:
    """A process wrote a line."""

    process: str
    stream: Stream
    line: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """A process has ended, with the exit code of `subprocess`, and what it started with it. Nothing follows."""

    process: str
    code: int


@dataclass(frozen=True, slots=True)
class Signalled:
    """This process got a signal."""

    number: signal.Signals


Event = Said | Ended | Signalled


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    lines: dict[Stream, Lines] = field(default_factory=lambda: {"stdout": Lines(), "stderr": Lines()})

    def pipe(self, stream: Stream) -> IO[bytes]:
        return cast("IO[bytes]", self.process.stdout if stream == "stdout" else self.process.stderr)


class Children:
    """Start processes and wait for what happens to them."""

    def __init__(self, woken: int, watcher: Watcher) -> None:
        self._running: dict[str, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._woken = woken
        self._watcher = watcher
        self._selector.register(woken, selectors.EVENT_READ)

    @property
    def running(self) -> list[str]:
        """Return the names of those that run."""
        return list(self._running)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a process under a name, with nothing to read; it ends when this one does, whatever the reason.

        Raises:
            InvalidOption: there is no such command, or its arguments are too long.
        """
        try:
            process = subprocess.Popen(
                dying_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as exc:
            raise InvalidOption(f"Cannot run {command[0]}: {exc.strerror}.", field="script", side="client") from exc
        self._watcher.begun(process.pid)
        child = self._running[name] = _Child(process)
        for stream in STREAMS:
            os.set_blocking(child.pipe(stream).fileno(), False)
            self._selector.register(child.pipe(stream), selectors.EVENT_READ, (name, stream))

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process, if it runs; SIGKILL goes to all that it started, too."""
        child = self._running.get(name)
        if child is not None:
            with suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(child.process.pid, number)
                else:
                    os.kill(child.process.pid, number)

    def wait(self, timeout_s: float | None) -> list[Event]:
        """Return what has happened, at the latest after `timeout_s`, when that may be nothing."""
        events: list[Event] = []
        numbers: list[signal.Signals] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                numbers = list(map(signal.Signals, os.read(self._woken, CHUNK_BYTES)))
            else:
                name, stream = key.data
                self._read(name, stream, events)
        if signal.SIGCHLD in numbers:
            for name in [name for name, child in self._running.items() if _has_ended(child.process.pid)]:
                self._bury(name, events)
        return [*events, *(Signalled(number) for number in numbers if number != signal.SIGCHLD)]

    def close(self) -> None:
        """Kill whoever still runs."""
        for name in self.running:
            self.signal(name, signal.SIGKILL)
            self._bury(name, [])
        self._selector.close()

    def _read(self, name: str, stream: Stream, events: list[Event]) -> bool:
        """Take what a process has written; return whether there may be more at once."""
        child = self._running[name]
        pipe = child.pipe(stream)
        try:
            data = os.read(pipe.fileno(), CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._end(pipe)
        lines = child.lines[stream].feed(data) if data else child.lines[stream].end()
        events += [Said(name, stream, line) for line in lines]
        return bool(data)

    def _end(self, pipe: IO[bytes]) -> None:
        self._selector.unregister(pipe)
        pipe.close()

    def _bury(self, name: str, events: list[Event]) -> None:
        """End what a process that has ended left behind; add what it wrote at last, and its end."""
        child = self._running[name]
        with suppress(ProcessLookupError, PermissionError):  # a group of nobody but the dead, on some systems
            os.killpg(child.process.pid, signal.SIGKILL)  # before its number can be another's
        self._watcher.over(child.process.pid)
        code = child.process.wait()
        for stream in STREAMS:
            pipe = child.pipe(stream)
            while not pipe.closed and self._read(name, stream, events):
                pass
            if not pipe.closed:
                self._end(pipe)
            events += [Said(name, stream, line) for line in child.lines[stream].end()]
        del self._running[name]
        events.append(Ended(name, code))


def _has_ended(pid: int) -> bool:
    """Return whether a child has ended; it keeps its number until it is waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextmanager
def children(directory: str = "") -> Iterator[Children]:
    """Yield a place to start processes from; whoever still runs is killed on the way out, whatever the way is.

    If this process is killed by SIGKILL, another one does the same and removes the directory, if one is named.

    Meanwhile the signals that end a process are events. One that is ignored already (`nohup`) stays so.
    """
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    numbers = [number for number in HANDED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _heard) for number in (*numbers, signal.SIGCHLD)}
    fd_before = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    try:
        with watched(directory) as watcher:
            found = Children(woken, watcher)
            try:
                yield found
            finally:
                found.close()
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, earlier in before.items():
            signal.signal(number, earlier)
        os.close(woken)
        os.close(waker)


def _heard(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the number has been written to the pipe that wakes the loop."""
