"""Bounded: each push is a step of its own, once its worker is not too far ahead of the slowest (SSP).

    c(w)   the steps that worker w has completed         m   the least c of a live worker; it never goes back
    push of w      c(w) <= m + staleness: it is a step, and then c(w) + 1;  else it waits
    m grows        when the slowest completes a step, leaves, or its lease runs out: who waits is looked at again
    joins          c(w) = m
    comes back     c(w) = max(c(w), m); its first gradient is stale if it misses more than the bound allows

Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from farstep.protocol.consistency import Bounded
from farstep_service.coordinator.modes.decisions import Abort, Decision, Pushed, Refuse, Skip, Step
from farstep_service.coordinator.modes.mode import Mode
from farstep_service.coordinator.roster import Roster


@dataclass(slots=True)
class BoundedState:
    """What a bounded mode knows.

    Attributes:
        least: the least count of steps of a live worker.
        clocks: by worker, how many steps it has completed.
        waiting: by worker, its push and the deadline of that, first to pass first.
        ready: the workers whose pushes wait for nothing any more.
        returned: the workers that had lapsed and have not pushed since.
    """

    least: int = 0
    clocks: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, tuple[Pushed, float]] = field(default_factory=dict)
    ready: dict[str, None] = field(default_factory=dict)
    returned: dict[str, None] = field(default_factory=dict)


@final
class BoundedMode(Mode):
    """Hold back the pushes of workers that are too far ahead.

    Args:
        mode: says how far that is.
        roster: who takes part; those who are there begin together.
        state: what another one knew.
    """

    record = BoundedState

    def __init__(self, mode: Bounded, roster: Roster, state: BoundedState | None = None) -> None:
        super().__init__(roster)
        self._mode = mode
        self.state: BoundedState = state or BoundedState(clocks=dict.fromkeys(roster.names(), 0))
        # How many live workers have completed so many steps.
        self._live = Counter(clock for worker, clock in self.state.clocks.items() if roster.is_live(worker))

    def offer(self, push: Pushed, now: float) -> None:
        self.state.waiting[push.worker] = push, now + self._mode.deadline_s
        self._look_at(push.worker)

    def withdraw(self, worker: str) -> None:
        self.state.waiting.pop(worker, None)
        self.state.ready.pop(worker, None)

    def decide(self, version: int, now: float) -> Decision | None:
        if self.state.ready:
            return self._next(next(worker for worker in self.state.waiting if worker in self.state.ready), version)
        for worker, (_, until) in self.state.waiting.items():
            if now < until:
                return None
            self.withdraw(worker)
            slow = [
                name for name, c in self.state.clocks.items() if c < self.state.clocks[worker] - self._mode.staleness
            ]
            missing = tuple(sorted(name for name in slow if self._roster.is_live(name)))
            return Abort((worker,), 1 + len(missing), missing)
        return None

    def _next(self, worker: str, version: int) -> Decision:
        push, _ = self.state.waiting[worker]
        self.withdraw(worker)
        returned = worker in self.state.returned
        self.state.returned.pop(worker, None)
        if returned and version - push.base > self._mode.bound(self._roster.live):
            return Refuse(worker, "stale")
        return Skip((worker,)) if push.skip else Step((worker,))

    @property
    def deadline(self) -> float | None:
        if not self.state.waiting:
            return None
        if self.state.ready:
            return 0.0
        _, until = next(iter(self.state.waiting.values()))
        lapse = self._roster.next_lapse
        return until if lapse is None else min(until, lapse)

    def completed(self, decision: Step | Skip, version: int) -> None:
        for worker in decision.workers:
            if worker in self.state.clocks:
                live = self._roster.is_live(worker)
                self._live[self.state.clocks[worker]] -= live
                self.state.clocks[worker] += 1
                self._live[self.state.clocks[worker]] += live
        self._advance()

    def joined(self, worker: str) -> None:
        self.state.clocks[worker] = self.state.least
        self._live[self.state.least] += 1

    def left(self, worker: str) -> None:
        if self._roster.is_live(worker):
            self._live[self.state.clocks[worker]] -= 1
        del self.state.clocks[worker]
        self.state.returned.pop(worker, None)
        self._advance()

    def lapsed(self, workers: Sequence[str]) -> None:
        for worker in workers:
            self._live[self.state.clocks[worker]] -= 1
        self._advance()

    def returned(self, worker: str) -> None:
        self.state.clocks[worker] = max(self.state.clocks[worker], self.state.least)
        self._live[self.state.clocks[worker]] += 1
        self.state.returned[worker] = None
        self._advance()  # no other worker may be live

    def _advance(self) -> None:
        """Let the least clock follow the slowest live worker, and look at who waits for it."""
        before = self.state.least
        if +self._live:
            while not self._live[self.state.least]:
                del self._live[self.state.least]
                self.state.least += 1
        if self.state.least != before:
            for worker in self.state.waiting:
                self._look_at(worker)

    def _look_at(self, worker: str) -> None:
        if self.state.clocks[worker] <= self.state.least + self._mode.staleness:
            self.state.ready[worker] = None
