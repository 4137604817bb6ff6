"""Sync: one step for the pushes of several workers, reduced in the order of their names.

    workers=N              a step is N pushes               deadline: given up, for all who wait
    workers=N, quorum=K    a step is K pushes or more       deadline: given up, for all who wait
    workers="live"         a step is one of each live one   deadline: taken without those who are missing

    late, with a quorum or "live": a step that its gradient does not know of was made without its worker
    ──► refuse: answered with the present parameters          ──► fold: its worker's part in the step being collected

Who skips is waited for like everybody else, so that the workers stay at the same step. Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from typing import final

from farstep.consistency import Sync
from farstep_service.coordinator.members import Members
from farstep_service.coordinator.modes.decisions import Abort, Decision, Pushed, Refuse, Skip, Step
from farstep_service.coordinator.modes.mode import Aggregation


@final
class Barrier(Aggregation):
    """Collect the pushes of one step.

    Args:
        mode: says how many they are.
        members: who takes part.
    """

    def __init__(self, mode: Sync, members: Members) -> None:
        super().__init__(members)
        self._mode = mode
        self._waiting: dict[str, Pushed] = {}
        self._late: list[str] = []
        self._until: float | None = None
        self._stepped = 0  # the version of the last step
        self._took_part: dict[str, int] = {}  # by worker: that of the last step it was part of
        self._missed: dict[
            str, int
        ] = {}  # by worker: that of the last step without it, before those it was part of since

    def offer(self, push: Pushed, now: float) -> None:
        if self._mode.partial and self._mode.late == "refuse" and push.base < self._last_without(push.worker):
            self._late.append(push.worker)
            return
        if not self._waiting:
            self._until = now + self._mode.deadline_s
        self._waiting[push.worker] = push

    def withdraw(self, worker: str) -> None:
        self._waiting.pop(worker, None)
        if not self._waiting:
            self._until = None

    def decide(self, version: int, now: float) -> Decision | None:
        if self._late:
            return Refuse(self._late.pop(), "late")
        if not self._waiting:
            return None
        if self._complete:
            return self._take()
        if self._until is None or now < self._until:
            return None
        without = tuple(sorted(self._members.awaited))
        if self._mode.workers == "live":
            return self._take(without=without)
        workers = tuple(sorted(self._waiting))
        missing = tuple(self._members.missing(self._waiting))
        self._clear()
        return Abort(workers, self._wanted, missing, without)

    @property
    def deadline(self) -> float | None:
        lapse = self._members.next_lapse if self._waiting and self._mode.workers == "live" else None
        if self._until is None or lapse is None:
            return self._until
        return min(self._until, lapse)

    def completed(self, decision: Step | Skip, version: int) -> None:
        if isinstance(decision, Skip):
            return
        for worker in decision.workers:
            self._missed[worker] = self._last_without(worker)
            self._took_part[worker] = version
        self._stepped = version

    def left(self, worker: str) -> None:
        self._took_part.pop(worker, None)
        self._missed.pop(worker, None)

    def _last_without(self, worker: str) -> int:
        """Return the version of the last step that was made without a worker, 0 if there is none."""
        return self._missed[worker] if self._took_part.get(worker) == self._stepped else self._stepped

    @property
    def _wanted(self) -> int:
        if self._mode.workers == "live":
            return self._members.live
        return self._mode.quorum or self._mode.workers

    @property
    def _complete(self) -> bool:
        if self._mode.workers == "live":
            return not self._members.awaited
        return len(self._waiting) >= self._wanted

    def _take(self, *, without: tuple[str, ...] = ()) -> Step | Skip:
        decision = Skip if any(push.skip for push in self._waiting.values()) else Step
        workers = tuple(sorted(self._waiting))
        self._clear()
        return decision(workers, without)

    def _clear(self) -> None:
        self._waiting.clear()
        self._until = None
