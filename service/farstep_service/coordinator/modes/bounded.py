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
from typing import final

from farstep.consistency import Bounded
from farstep_service.coordinator.members import Members
from farstep_service.coordinator.modes.decisions import Abort, Decision, Pushed, Refuse, Skip, Step
from farstep_service.coordinator.modes.mode import Aggregation


@final
class Window(Aggregation):
    """Hold back the pushes of workers that are too far ahead.

    Args:
        mode: says how far that is.
        members: who takes part; those who are there begin together.
    """

    def __init__(self, mode: Bounded, members: Members) -> None:
        super().__init__(members)
        self._mode = mode
        self._least = 0
        self._clocks = dict.fromkeys(members.names(), 0)
        self._live = Counter({0: members.live})  # how many live workers have completed so many steps
        self._waiting: dict[str, tuple[Pushed, float]] = {}  # with its deadline, first to pass first
        self._ready: dict[str, None] = {}
        self._returned: set[str] = set()

    def offer(self, push: Pushed, now: float) -> None:
        self._waiting[push.worker] = push, now + self._mode.deadline_s
        self._look_at(push.worker)

    def withdraw(self, worker: str) -> None:
        self._waiting.pop(worker, None)
        self._ready.pop(worker, None)

    def decide(self, version: int, now: float) -> Decision | None:
        if self._ready:
            return self._next(next(worker for worker in self._waiting if worker in self._ready), version)
        for worker, (_, until) in self._waiting.items():
            if now < until:
                return None
            self.withdraw(worker)
            slow = [name for name, c in self._clocks.items() if c < self._clocks[worker] - self._mode.staleness]
            missing = tuple(sorted(name for name in slow if self._members.is_live(name)))
            return Abort((worker,), 1 + len(missing), missing)
        return None

    def _next(self, worker: str, version: int) -> Decision:
        push, _ = self._waiting[worker]
        self.withdraw(worker)
        returned = worker in self._returned
        self._returned.discard(worker)
        if returned and version - push.base > self._mode.bound(self._members.live):
            return Refuse(worker, "stale")
        return Skip((worker,)) if push.skip else Step((worker,))

    @property
    def deadline(self) -> float | None:
        if not self._waiting:
            return None
        if self._ready:
            return 0.0
        _, until = next(iter(self._waiting.values()))
        lapse = self._members.next_lapse
        return until if lapse is None else min(until, lapse)

    def completed(self, decision: Step | Skip, version: int) -> None:
        for worker in decision.workers:
            if worker in self._clocks:
                live = self._members.is_live(worker)
                self._live[self._clocks[worker]] -= live
                self._clocks[worker] += 1
                self._live[self._clocks[worker]] += live
        self._advance()

    def joined(self, worker: str) -> None:
        self._clocks[worker] = self._least
        self._live[self._least] += 1

    def left(self, worker: str) -> None:
        if self._members.is_live(worker):
            self._live[self._clocks[worker]] -= 1
        del self._clocks[worker]
        self._returned.discard(worker)
        self._advance()

    def lapsed(self, workers: Sequence[str]) -> None:
        for worker in workers:
            self._live[self._clocks[worker]] -= 1
        self._advance()

    def returned(self, worker: str) -> None:
        self._clocks[worker] = max(self._clocks[worker], self._least)
        self._live[self._clocks[worker]] += 1
        self._returned.add(worker)
        self._advance()  # nobody else may be live

    def _advance(self) -> None:
        """Let the least clock follow the slowest live worker, and look at who waits for it."""
        before = self._least
        if +self._live:
            while not self._live[self._least]:
                del self._live[self._least]
                self._least += 1
        if self._least != before:
            for worker in self._waiting:
                self._look_at(worker)

    def _look_at(self, worker: str) -> None:
        if self._clocks[worker] <= self._least + self._mode.staleness:
            self._ready[worker] = None
