"""Sync: one step for the pushes of several workers, reduced in the order of their names.

    workers=N              a step is N pushes               deadline: given up, for all who wait
    workers=N, quorum=K    a step is K pushes or more       deadline: given up, for all who wait
    workers="live"         a step is one of each live one   deadline: taken without those who are missing

    late, with a quorum or "live": a step that its gradient does not know of was made without its worker
    ──► refuse: answered with the present parameters          ──► fold: its worker's part in the step being collected

Who skips is waited for like everybody else, so that the workers stay at the same step. Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from farstep.protocol.consistency import Sync
from farstep_service.coordinator.modes.decisions import Abort, Decision, Pushed, Refuse, Skip, Step
from farstep_service.coordinator.modes.mode import Mode
from farstep_service.coordinator.roster import Roster


@dataclass(slots=True)
class SyncState:
    """What a sync mode knows.

    Attributes:
        waiting: the pushes of the step that is being collected, by worker.
        late: the workers whose pushes are to be refused as late.
        until: when that step's deadline passes; None if nothing waits.
        stepped: the version of the last step.
        took_part: by worker, the version of the last step it was part of.
        missed: by worker, the version of the last step without it, before those it was part of since.
    """

    waiting: dict[str, Pushed] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    until: float | None = None
    stepped: int = 0
    took_part: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)


@final
class SyncMode(Mode):
    """Collect the pushes of one step.

    Args:
        mode: says how many they are.
        roster: who takes part.
        state: what another one knew.
    """

    record = SyncState

    def __init__(self, mode: Sync, roster: Roster, state: SyncState | None = None) -> None:
        super().__init__(roster)
        self._mode = mode
        self.state: SyncState = state or SyncState()

    def offer(self, push: Pushed, now: float) -> None:
        if self._mode.partial and self._mode.late == "refuse" and push.base < self._last_without(push.worker):
            self.state.late.append(push.worker)
            return
        if not self.state.waiting:
            self.state.until = now + self._mode.deadline_s
        self.state.waiting[push.worker] = push

    def withdraw(self, worker: str) -> None:
        self.state.waiting.pop(worker, None)
        if not self.state.waiting:
            self.state.until = None

    def decide(self, version: int, now: float) -> Decision | None:
        if self.state.late:
            return Refuse(self.state.late.pop(), "late")
        if not self.state.waiting:
            return None
        if self._complete:
            return self._take()
        if self.state.until is None or now < self.state.until:
            return None
        without = tuple(sorted(self._roster.awaited))
        if self._mode.workers == "live":
            return self._take(without=without)
        workers = tuple(sorted(self.state.waiting))
        missing = tuple(self._roster.missing(self.state.waiting))
        self._clear()
        return Abort(workers, self._wanted, missing, without)

    @property
    def deadline(self) -> float | None:
        lapse = self._roster.next_lapse if self.state.waiting and self._mode.workers == "live" else None
        if self.state.until is None or lapse is None:
            return self.state.until
        return min(self.state.until, lapse)

    def completed(self, decision: Step | Skip, version: int) -> None:
        if isinstance(decision, Skip):
            return
        for worker in decision.workers:
            self.state.missed[worker] = self._last_without(worker)
            self.state.took_part[worker] = version
        self.state.stepped = version

    def left(self, worker: str) -> None:
        self.state.took_part.pop(worker, None)
        self.state.missed.pop(worker, None)

    def _last_without(self, worker: str) -> int:
        """Return the version of the last step that was made without a worker, 0 if there is none."""
        return (
            self.state.missed[worker] if self.state.took_part.get(worker) == self.state.stepped else self.state.stepped
        )

    @property
    def _wanted(self) -> int:
        if self._mode.workers == "live":
            return self._roster.live
        return self._mode.quorum or self._mode.workers

    @property
    def _complete(self) -> bool:
        if self._mode.workers == "live":
            return not self._roster.awaited
        return len(self.state.waiting) >= self._wanted

    def _take(self, *, without: tuple[str, ...] = ()) -> Step | Skip:
        decision = Skip if any(push.skip for push in self.state.waiting.values()) else Step
        workers = tuple(sorted(self.state.waiting))
        self._clear()
        return decision(workers, without)

    def _clear(self) -> None:
        self.state.waiting.clear()
        self.state.until = None
