"""When pushes become a step: one small state machine for each consistency mode.

    Mode
    ├── AsyncMode      each push is a step                                                table.py
    ├── SyncMode       one push of each of N, of K of N, or of every live worker          sync.py
    └── BoundedMode    each push is a step, once its worker is not too far ahead          bounded.py

Events and the time go in, decisions come out, one at a time; the coordinator acts on each before it asks for the next.
All that a mode knows is one record, `state`, which can be written down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from farstep_service.coordinator.modes.decisions import Decision, Pushed, Skip, Step
from farstep_service.coordinator.roster import Roster


class Mode(ABC):
    """Decide what becomes of the pushes that wait. A worker has at most one.

    Args:
        roster: who takes part; it is looked at, not changed.
    """

    record: ClassVar[type]
    """The dataclass of all that it knows."""
    state: Any
    """All that it knows."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

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
        """Note that a worker is not a member any more, just before it leaves the roster."""

    def lapsed(self, workers: Sequence[str]) -> None:  # noqa: B027
        """Note that workers are not live any more."""

    def returned(self, worker: str) -> None:  # noqa: B027
        """Note that a worker that had lapsed is live again."""
