"""When pushes become a step: one small state machine for each consistency mode.

Events and the time go in, decisions come out; the session acts on them. Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import assert_never

from farstep.consistency import Async, Consistency, Sync


@dataclass(frozen=True, slots=True)
class Step:
    """Reduce the pushes of these workers, in this order, divide by `divisor`, and apply."""

    workers: tuple[str, ...]
    divisor: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Apply nothing: one of these workers skips the step, so all of them do, with one outcome."""

    workers: tuple[str, ...]
    divisor: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Give the step up: every waiting worker gets the same answer, and may push again."""

    waiting: tuple[str, ...]
    arrived: int
    wanted: int


Decision = Step | Skip | Abort


class Aggregation(ABC):
    """Decide when the pushes that wait become a step. A worker has at most one push waiting."""

    @abstractmethod
    def places(self) -> int | None:
        """Return how many workers the mode has room for, None for any number."""

    @abstractmethod
    def offer(self, worker: str, now: float, *, skip: bool = False) -> Step | Skip | None:
        """Add the push of `worker` at `now` (monotonic seconds); return what it completes.

        Args:
            skip: the worker has no gradients to give to this step and asks that nobody takes it.
        """

    @abstractmethod
    def withdraw(self, worker: str) -> None:
        """Take the waiting push of `worker` out, if there is one."""

    @abstractmethod
    def tick(self, now: float) -> Abort | None:
        """Return the decision that the passing of time alone makes."""

    @property
    @abstractmethod
    def deadline(self) -> float | None:
        """The time at which `tick` has something to decide, None if nothing waits."""


class Immediate(Aggregation):
    """Async: each push is a step."""

    def places(self) -> int | None:
        return None

    def offer(self, worker: str, now: float, *, skip: bool = False) -> Step | Skip | None:
        return Skip((worker,), 1) if skip else Step((worker,), 1)

    def withdraw(self, worker: str) -> None:
        return None

    def tick(self, now: float) -> Abort | None:
        return None

    @property
    def deadline(self) -> float | None:
        return None


class Barrier(Aggregation):
    """Sync: a step is one push of each of N workers, reduced in the order of their names.

    Who skips is waited for like everybody else, so that the workers stay at the same step.
    """

    def __init__(self, mode: Sync) -> None:
        self._mode = mode
        self._waiting: set[str] = set()
        self._skipping: set[str] = set()
        self._deadline: float | None = None

    def places(self) -> int | None:
        return self._mode.workers

    def offer(self, worker: str, now: float, *, skip: bool = False) -> Step | Skip | None:
        if not self._waiting:
            self._deadline = now + self._mode.deadline_s
        self._waiting.add(worker)
        if skip:
            self._skipping.add(worker)
        if len(self._waiting) < self._mode.workers:
            return None
        decision = Skip if self._skipping else Step
        return decision(self._clear(), self._mode.workers)

    def withdraw(self, worker: str) -> None:
        self._waiting.discard(worker)
        self._skipping.discard(worker)
        if not self._waiting:
            self._deadline = None

    def tick(self, now: float) -> Abort | None:
        if self._deadline is None or now < self._deadline:
            return None
        waiting = self._clear()
        return Abort(waiting, len(waiting), self._mode.workers)

    @property
    def deadline(self) -> float | None:
        return self._deadline

    def _clear(self) -> tuple[str, ...]:
        waiting = tuple(sorted(self._waiting))
        self._waiting.clear()
        self._skipping.clear()
        self._deadline = None
        return waiting


def aggregation_for(mode: Consistency) -> Aggregation:
    """Return a fresh state machine for a consistency mode."""
    match mode:
        case Async():
            return Immediate()
        case Sync():
            return Barrier(mode)
        case _:
            assert_never(mode)
