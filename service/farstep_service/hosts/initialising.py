"""Which worker sends a session its first contents: one at a time, and another one if it takes too long."""

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

    def chooses(self, worker: str) -> bool:
        """Say whether a worker that joins is asked for them, which gives it time from now on."""
        now = self._clock()
        if worker != self._worker and now < self._until:
            return False
        self._worker, self._until = worker, now + INITIALISE_WITHIN_S
        return True
