"""When pushes become a step: one small state machine for each consistency mode.

    Aggregation
    ├── Immediate    Async: each push is a step
    ├── Barrier      Sync: one push of each of N, of K of N, or of every live worker          barrier.py
    └── Window       Bounded: each push is a step, once its worker is not too far ahead       window.py

Events and the time go in, decisions come out, one at a time; the session acts on each before it asks for the next.
Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from farstep_service.coordinator.members import Members
from farstep_service.coordinator.modes.decisions import Decision, Pushed, Skip, Step


class Aggregation(ABC):
    """Decide what becomes of the pushes that wait. A worker has at most one.

    Args:
        members: who takes part; it is looked at, not changed.
    """

    def __init__(self, members: Members) -> None:
        self._members = members

    @abstractmethod
    def offer(self, push: Pushed, now: float) -> None:
        """Add a push, at `now` (monotonic seconds)."""

    @abstractmethod
    def withdraw(self, worker: str) -> None:
        """Take the waiting push of a worker out."""

    @abstractmethod
    def decide(self, version: int, now: float) -> Decision | None:
        """Return the next decision, whose pushes do not wait any more; None if there is nothing to decide.

        Args:
            version: the session's.
            now: monotonic seconds.
        """

    @property
    @abstractmethod
    def deadline(self) -> float | None:
        """The time at which `decide` may have something to decide without another event, None for never."""

    def completed(self, decision: Step | Skip, version: int) -> None:  # noqa: B027  # most modes need not know
        """Note that a step was taken, which led to that version, or skipped."""

    def joined(self, worker: str) -> None:  # noqa: B027
        """Note that a worker joined."""

    def left(self, worker: str) -> None:  # noqa: B027
        """Note that a worker is not a member any more."""

    def lapsed(self, workers: Sequence[str]) -> None:  # noqa: B027
        """Note that workers are not live any more."""

    def returned(self, worker: str) -> None:  # noqa: B027
        """Note that a worker that had lapsed is live again."""


class Immediate(Aggregation):
    """Async: each push is a step."""

    def __init__(self, members: Members) -> None:
        super().__init__(members)
        self._ready: dict[str, Pushed] = {}

    def offer(self, push: Pushed, now: float) -> None:
        self._ready[push.worker] = push

    def withdraw(self, worker: str) -> None:
        self._ready.pop(worker, None)

    def decide(self, version: int, now: float) -> Decision | None:
        if not self._ready:
            return None
        push = self._ready.pop(next(iter(self._ready)))
        return Skip((push.worker,)) if push.skip else Step((push.worker,))

    @property
    def deadline(self) -> float | None:
        return None
