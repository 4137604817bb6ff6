"""The course of a run: what is to be done when a process ends or a signal comes. Pure: no clock, no process.

    a worker ends with 0         it is done; when all are, the run is over, with 0
    it fails                     it is started again, `max_restarts` times; then all others are asked to end, and the
                                 run is over, with the exit code of this one
    a signal comes               it is handed on to all workers; nobody is started again; over with 128 and its number
    it comes again               whoever still runs is killed
    the server ends              all workers are asked to end; over with 1: what they trained is gone

The first of these that fails a run decides its exit code.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import final


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker again."""

    worker: str
    restarts: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Send a signal to all workers that run."""

    number: signal.Signals


@final
class RestartPolicy:
    """Decide what follows on what happens.

    Args:
        workers: their names; all have been started.
        max_restarts: how often each is started again.

    Attributes:
        running: the workers that run.
        restarts: how often each was started again.
        codes: the exit codes of those that have ended for good, as a shell gives them.
        failure: the run's exit code, 0 as long as nothing failed it.
    """

    def __init__(self, workers: list[str], max_restarts: int) -> None:
        self.running = set(workers)
        self.restarts = dict.fromkeys(workers, 0)
        self.codes: dict[str, int] = {}
        self.failure = 0
        self._max_restarts = max_restarts
        self._stopping = False

    @property
    def over(self) -> bool:
        """Return whether nobody runs any more."""
        return not self.running

    def ended(self, worker: str, code: int) -> Start | Stop | None:
        """Take note of a worker's end, with the exit code of `subprocess`."""
        if code and not self._stopping and self.restarts[worker] < self._max_restarts:
            self.restarts[worker] += 1
            return Start(worker, self.restarts[worker])
        self.running.discard(worker)
        self.codes[worker] = exit_code(code)
        if not code or self._stopping:
            return None
        return self._fail(exit_code(code), signal.SIGTERM)

    def signalled(self, number: signal.Signals) -> Stop:
        """Take note of a signal to the whole run."""
        if self._stopping:
            return Stop(signal.SIGKILL)
        return self._fail(128 + number, number)

    def server_ended(self) -> Stop | None:
        """Take note that the server is no more."""
        return None if self._stopping else self._fail(1, signal.SIGTERM)

    def _fail(self, code: int, number: signal.Signals) -> Stop:
        self.failure = code
        self._stopping = True
        return Stop(number)


def exit_code(code: int) -> int:
    """Return an exit code as a shell gives it: 128 and the number of the signal that ended a process."""
    return code if code >= 0 else 128 - code


def in_words(code: int) -> str:
    """Say how a process ended, from the exit code of `subprocess`."""
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {_name(-code)}"


def _name(number: int) -> str:
    """Return what a signal is called; of those for programs' own use only the first and the last have names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
