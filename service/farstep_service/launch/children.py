"""Child processes: started, read line by line, signalled, and none of them left behind.

Each leads a process group of its own, so that Ctrl-C reaches the launcher alone, which passes it on, and so that what
a worker started (data loaders) ends with it. One selector waits for output, exits and signals; nothing polls.

`Lines` cuts what a process writes into whole lines, so that the output of several processes does not mix.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Literal, cast, final

from farstep.errors import invalid_option
from farstep_service.launch.die_with_parent import Watcher, dying_with_parent, watched

LONGEST_BYTES = 65_536
"""A longer line is cut."""


@final
class Lines:
    """Collect the bytes of one stream, and return them line by line, without line ends.

    A progress bar overwrites its own line again and again (`\\r`); the line is what it shows at the end.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that more bytes complete."""
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
    """Return what a terminal would show of a line. A `\\r` at its end stays: more may overwrite the line."""
    return line[line.rfind(b"\r", 0, -1) + 1 :]


Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")
CHUNK_BYTES = 65_536
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class LineWritten:
    """A process wrote a line."""

    process: str
    stream: Stream
    line: bytes


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A process and all that it started have ended; no other event of it follows.

    Attributes:
        process: its name.
        code: its exit code as `subprocess` gives it, negative for a signal.
        last_error: the last line of its standard error that is not blank, "" if there is none.
    """

    process: str
    code: int
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class SignalReceived:
    """This process received a signal."""

    number: signal.Signals


Event = LineWritten | ProcessExited | SignalReceived


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    lines: dict[Stream, Lines] = field(default_factory=lambda: {"stdout": Lines(), "stderr": Lines()})
    last_error: bytes = b""

    def pipe(self, stream: Stream) -> IO[bytes]:
        return cast("IO[bytes]", self.process.stdout if stream == "stdout" else self.process.stderr)


class Children:
    """Start processes, and wait for what they write and for their exits.

    Args:
        wakeup_fd: a pipe from which the numbers of signals are read.
        watcher: kills the processes if this one is killed.
        signals: those that become events; other signals keep their handlers.
    """

    def __init__(self, wakeup_fd: int, watcher: Watcher, signals: Collection[signal.Signals] = ENDING_SIGNALS) -> None:
        self._running: dict[str, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._wakeup_fd = wakeup_fd
        self._watcher = watcher
        self._signals = frozenset(signals)
        self._pending: list[Event] = []
        self._selector.register(wakeup_fd, selectors.EVENT_READ)

    @property
    def running(self) -> list[str]:
        """Return the names of the processes that run."""
        return list(self._running)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start a process under a name, with an empty standard input, and return its process id.

        The process ends when this one does, whatever the reason.

        Raises:
            InvalidOption: the command does not exist, or its arguments are too long.
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
            raise invalid_option(f"Cannot run {command[0]}: {exc.strerror}.", field="script") from exc
        self._watcher.started(process.pid)
        child = self._running[name] = _Child(process)
        for stream in STREAMS:
            os.set_blocking(child.pipe(stream).fileno(), False)
            self._selector.register(child.pipe(stream), selectors.EVENT_READ, (name, stream))
        return process.pid

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process, if it runs; SIGKILL also goes to all that it started."""
        child = self._running.get(name)
        if child is not None:
            with suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(child.process.pid, number)
                else:
                    os.kill(child.process.pid, number)

    def wait(self, timeout_s: float | None) -> list[Event]:
        """Return the events since the last call, after at most `timeout_s`; the list may be empty."""
        events, self._pending = self._pending, []
        numbers: list[int] = []
        for key, _ in self._selector.select(0 if events else timeout_s):
            if key.data is None:
                numbers = list(os.read(self._wakeup_fd, CHUNK_BYTES))
            else:
                name, stream = key.data
                self._read(name, stream, events)
        if signal.SIGCHLD in numbers:
            for name in [name for name, child in self._running.items() if _has_exited(child.process.pid)]:
                self._reap(name, events)
        return [*events, *(SignalReceived(signal.Signals(number)) for number in numbers if number in self._signals)]

    def stop(self, *names: str, within_s: float) -> list[Event]:
        """End processes and return the events of these: SIGTERM, and SIGKILL for those that run after `within_s`.

        Events of other processes, and signals, stay for `wait`.
        """
        give_up = time.monotonic() + within_s
        for name in names:
            self.signal(name, signal.SIGTERM)
        events, self._pending = self._pending, []
        while not self._running.keys().isdisjoint(names) and (left_s := give_up - time.monotonic()) > 0:
            events += self.wait(left_s)
        for name in self._running.keys() & set(names):
            self.signal(name, signal.SIGKILL)
            self._reap(name, events)
        stopped: list[Event] = []
        for event in events:
            mine = not isinstance(event, SignalReceived) and event.process in names
            (stopped if mine else self._pending).append(event)
        return stopped

    def close(self) -> None:
        """Kill the processes that still run."""
        for name in self.running:
            self.signal(name, signal.SIGKILL)
            self._reap(name, [])
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
            self._close_pipe(pipe)
        self._take_lines(name, stream, child.lines[stream].feed(data) if data else child.lines[stream].end(), events)
        return bool(data)

    def _take_lines(self, name: str, stream: Stream, lines: list[bytes], events: list[Event]) -> None:
        events += [LineWritten(name, stream, line) for line in lines]
        if stream == "stderr":
            child = self._running[name]
            child.last_error = next((line for line in reversed(lines) if line.strip()), child.last_error)

    def _close_pipe(self, pipe: IO[bytes]) -> None:
        self._selector.unregister(pipe)
        pipe.close()

    def _reap(self, name: str, events: list[Event]) -> None:
        """Kill what a process that has ended left behind; add its last lines and its exit."""
        child = self._running[name]
        with suppress(ProcessLookupError, PermissionError):  # some systems refuse a group of zombies only
            os.killpg(child.process.pid, signal.SIGKILL)  # before another process can get its number
        self._watcher.ended(child.process.pid)
        code = child.process.wait()
        for stream in STREAMS:
            pipe = child.pipe(stream)
            while not pipe.closed and self._read(name, stream, events):
                pass
            if not pipe.closed:
                self._close_pipe(pipe)
            self._take_lines(name, stream, child.lines[stream].end(), events)
        del self._running[name]
        events.append(ProcessExited(name, code, child.last_error.decode(errors="replace").strip()))


def _has_exited(pid: int) -> bool:
    """Return whether a child has exited, without reaping it: its number stays taken."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextmanager
def children(directory: str = "", *, signals: Collection[signal.Signals] = ENDING_SIGNALS) -> Iterator[Children]:
    """Yield `Children`, and kill those that still run on the way out.

    If this process is killed by SIGKILL, another process kills them, and removes a directory.

    Args:
        directory: the directory to remove, if any.
        signals: those that become events meanwhile. One that is ignored already (`nohup`) stays ignored.
    """
    wakeup_fd, signal_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)
    os.set_blocking(signal_fd, False)
    numbers = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _wake) for number in (*numbers, signal.SIGCHLD)}
    fd_before = signal.set_wakeup_fd(signal_fd, warn_on_full_buffer=False)
    try:
        with watched(directory) as watcher:
            started = Children(wakeup_fd, watcher, numbers)
            try:
                yield started
            finally:
                started.close()
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, earlier in before.items():
            signal.signal(number, earlier)
        os.close(wakeup_fd)
        os.close(signal_fd)


def _wake(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: Python has written the number to the pipe that wakes the selector."""
