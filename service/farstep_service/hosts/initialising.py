"""Which worker sends a session its first contents: one at a time, and another one if it is gone or takes too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

INITIALISE_WITHIN_S: Final = 60.0
"""How long the first contents may take before another worker is asked for them."""


@final
class Initialising:
    """Choose the worker that sends the first contents.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._worker = ""
        self._until = -1.0

    def chooses(self, worker: str, is_live: Callable[[str, float], bool]) -> bool:
        """Say whether a worker that joins is asked for them, which gives it time from now on.

        Args:
            worker: who joins.
            is_live: says whether a worker has neither left nor let its lease run out at a time.
        """
        now = self._clock()
        if worker != self._worker and now < self._until and is_live(self._worker, now):
            return False
        self._worker, self._until = worker, now + INITIALISE_WITHIN_S
        return True
