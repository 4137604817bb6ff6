"""What a run does when a process ends or a signal comes. Pure: no clock, no process.

    a worker ends with 0         it is done; the run ends with 0 when all are done
    a worker fails               it is restarted, at most `max_restarts` times; then all others get SIGTERM, and the run
                                 ends with the exit code of this one
    a signal comes               all workers get it; none is restarted; the run ends with 128 and the signal's number
    a second signal comes        the workers that still run are killed
    the server ends              all workers get SIGTERM; the run ends with 1: what they trained is gone

The first of these that fails a run decides its exit code.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import final


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart a worker."""

    worker: str
    restarts: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Send a signal to all workers that run."""

    number: signal.Signals


@final
class RestartPolicy:
    """Decide whether to restart or stop workers.

    Args:
        workers: names of the workers, all of them started.
        max_restarts: how often each is restarted.

    Attributes:
        running: the workers that run.
        restarts: how often each was restarted.
        codes: exit codes of the workers that have ended for good, as a shell gives them.
        failure: the run's exit code, 0 until something fails the run.
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
        """Return whether all workers have ended."""
        return not self.running

    def ended(self, worker: str, code: int) -> Restart | Stop | None:
        """Decide what follows the end of a worker, given the exit code of `subprocess`."""
        if code and not self._stopping and self.restarts[worker] < self._max_restarts:
            self.restarts[worker] += 1
            return Restart(worker, self.restarts[worker])
        self.running.discard(worker)
        self.codes[worker] = exit_code(code)
        if not code or self._stopping:
            return None
        return self._fail(exit_code(code), signal.SIGTERM)

    def signalled(self, number: signal.Signals) -> Stop:
        """Decide what follows a signal to the whole run."""
        if self._stopping:
            return Stop(signal.SIGKILL)
        return self._fail(128 + number, number)

    def server_ended(self) -> Stop | None:
        """Decide what follows the end of the server."""
        return None if self._stopping else self._fail(1, signal.SIGTERM)

    def _fail(self, code: int, number: signal.Signals) -> Stop:
        self.failure = code
        self._stopping = True
        return Stop(number)


def exit_code(code: int) -> int:
    """Return an exit code as a shell gives it: 128 and the number of the signal that ended a process."""
    return code if code >= 0 else 128 - code


def in_words(code: int) -> str:
    """Describe how a process ended, given the exit code of `subprocess`."""
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {_name(-code)}"


def _name(number: int) -> str:
    """Return the name of a signal; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
