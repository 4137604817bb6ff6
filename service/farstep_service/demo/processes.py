"""The processes of the demo: started together, watched through one queue, and ended together, whatever happens.

Ctrl-C reaches the demo alone, which then ends them in order. What a process prints arrives line by line; when it ends,
that arrives too, after its last line. Nobody polls.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from farstep.errors import FarstepError
from farstep_service.launch.die_with_parent import Watcher, dying_with_parent, watched
from farstep_service.machine import answered

STOP_S = 2.0
"""How long a process may take to end by itself before it is killed; none of them has anything to save."""
LAST_LINES_S = 1.0
"""How long the last lines of a process that ended may take to arrive."""
KEPT = frozenset({"FARSTEP_KERNEL_CACHE"})
"""What the demo's processes take over from the user's settings: the demo's server is not the user's."""


class ProcessEnded(FarstepError):
    """A process that others need has ended, or does not move."""

    code = "process_ended"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a process printed on its standard output."""

    process: str
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended, with the exit code of `subprocess`: negative for a signal."""

    process: str
    code: int


@contextmanager
def started() -> Iterator[Processes]:
    """Yield a place to start processes from; those that still run are ended on the way out, whatever the way is.

    SIGTERM and SIGHUP leave as Ctrl-C does, through this exit, with the exit code that shells give them. If this
    process is killed, a watcher ends them, and what they started.
    """
    with (
        tempfile.TemporaryDirectory(prefix="farstep-demo-") as place,
        watched(place) as watcher,
        answered(_leave, signal.SIGTERM, signal.SIGHUP),
    ):
        processes = Processes(Path(place), watcher)
        try:
            yield processes
        finally:
            with answered(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                processes.stop()


class Processes:
    """Start processes and watch them.

    Args:
        place: a directory for what they write to their standard error.
        watcher: ends them if this process is killed.
    """

    def __init__(self, place: Path, watcher: Watcher) -> None:
        self._place = place
        self._watcher = watcher
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._events: queue.SimpleQueue[tuple[subprocess.Popen[str], Line | Ended]] = queue.SimpleQueue()
        self._later: deque[Line | Ended] = deque()

    def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> int:
        """Start `python arguments...` under a name and return its process id.

        Args:
            environment: variables beside those that every process of the demo gets.
        """
        with open(self._errors(name), "w") as errors:
            process = subprocess.Popen(
                dying_with_parent([sys.executable, "-P", *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**_environment(), **(environment or {})},
                text=True,
                start_new_session=True,
            )
        self._watcher.begun(process.pid)
        self._running[name] = process
        threading.Thread(target=self._watch, args=(name, process), name=f"watch-{name}", daemon=True).start()
        return process.pid

    def next(self, timeout_s: float) -> Line | Ended:
        """Return what happens next. What was stopped here is not heard of again.

        Raises:
            ProcessEnded: nothing happened for `timeout_s`.
        """
        if self._later:
            return self._later.popleft()
        while True:
            try:
                process, event = self._events.get(timeout=timeout_s)
            except queue.Empty:
                names = ", ".join(sorted(self._running))
                raise ProcessEnded(f"Nothing was heard from {names} for {timeout_s:g} s.", side="client") from None
            if self._running.get(event.process) is process:
                return event

    def line_of(self, name: str, timeout_s: float) -> str:
        """Return the next line of one process; what the others say meanwhile is kept for `next`.

        Raises:
            ProcessEnded: it has ended, or nobody said anything for `timeout_s`.
        """
        others: list[Line | Ended] = []
        try:
            while True:
                event = self.next(timeout_s)
                if event.process != name:
                    others.append(event)
                elif isinstance(event, Ended):
                    raise self.failure(event)
                else:
                    return event.text
        finally:
            self._later.extendleft(reversed(others))

    def failure(self, ended: Ended) -> ProcessEnded:
        """Return the error for a process that ended too early, with the last thing it wrote to its standard error."""
        how = f"ended with exit code {ended.code}"
        if ended.code < 0:
            how = f"was ended by {signal.Signals(-ended.code).name}"
        words = self._last_words(ended.process)
        return ProcessEnded(f"{ended.process} {how}{': ' + words if words else ''}.", side="client")

    def stop(self, *names: str) -> None:
        """End the processes of these names, the last started first; all of them if none is named."""
        chosen = [name for name in reversed(self._running) if name in names or not names]
        stopping = {name: self._running.pop(name) for name in chosen}
        for process in stopping.values():
            process.terminate()
        give_up = time.monotonic() + STOP_S
        for process in stopping.values():
            try:
                process.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, name: str, process: subprocess.Popen[str]) -> None:
        reader = threading.Thread(target=self._read, args=(name, process), name=f"read-{name}", daemon=True)
        reader.start()
        code = process.wait()
        self._watcher.over(process.pid)
        # A child of the process may hold its standard output open for as long as it likes.
        reader.join(LAST_LINES_S)
        self._events.put((process, Ended(name, code)))

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        if process.stdout is not None:
            with process.stdout as output:
                for line in output:
                    self._events.put((process, Line(name, line.rstrip("\n"))))

    def _errors(self, name: str) -> Path:
        return self._place / f"{name}.log"

    def _last_words(self, name: str) -> str:
        lines = self._errors(name).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "").rstrip(".")


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FARSTEP_") or name in KEPT}
    return {**inherited, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
