"""How long a promise may take to be kept, on a machine that may be busy with others.

A promise to know something within a second is broken by a process that sleeps too long, or computes too much. It is not
broken by a process that is ready and is not run, because the processors run somebody else. Linux counts that for every
thread (the second number of its `schedstat`), so the limit is

    the time promised  +  the time that the threads of the processes concerned were ready and did not run

Where the kernel does not count, the limit is the time promised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path


def held_up_s(process: int) -> float:
    """Return for how long the threads of a process have been ready without running, 0 if it has ended."""
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
    except OSError:
        return 0.0
    return sum(map(_thread_held_up_s, threads))


def _thread_held_up_s(thread: Path) -> float:
    try:
        return int((thread / "schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


class Limit:
    """Begin to count.

    Args:
        within_s: the time promised.
        processes: those that have to keep the promise.
        clock, held_up: what tells the time, and how long a process has been held up.
    """

    def __init__(
        self,
        within_s: float,
        processes: Sequence[int],
        *,
        clock: Callable[[], float] = time.monotonic,
        held_up: Callable[[int], float] = held_up_s,
    ) -> None:
        self._within_s, self._clock, self._held_up = within_s, clock, held_up
        self._began = clock()
        self._before = {process: held_up(process) for process in processes}

    def left_s(self) -> float:
        """Return how much time is left, 0 if none is. It may grow again while the machine is busy."""
        held_up_s = sum(max(0.0, self._held_up(process) - before) for process, before in self._before.items())
        return max(0.0, self._began + self._within_s + held_up_s - self._clock())
