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

    def chooses(self, worker: str, lease_s: Callable[[str, float], float]) -> bool:
        """Say whether a worker that joins is asked for them, which gives it time from now on.

        Args:
            worker: who joins.
            lease_s: says how long a worker's lease still runs at a time, 0 if it has run out or the worker has left.
        """
        now = self._clock()
        if worker != self._worker and now < self._until and lease_s(self._worker, now) > 0:
            return False
        self._worker, self._until = worker, now + INITIALISE_WITHIN_S
        return True
