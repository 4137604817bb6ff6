"""Workers of a session and what its coordinator decides about their pushes, without tensors and clocks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from farstep.errors import BarrierTimeout
from farstep.protocol.consistency import Consistency
from farstep.protocol.messages import PushHead, WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator import (
    Answer,
    ChangeMode,
    Coordinator,
    CoordinatorState,
    Event,
    Instruction,
    Join,
    Leave,
    LeaveOut,
    NoStep,
    Push,
    Result,
    StepTaken,
    TakeStep,
    Tick,
)
from farstep_service.coordinator.modes.decisions import Abort, Decision

NAMES = ("w0", "w1", "w2")


def result_of(instruction: Instruction, version: int) -> Result | None:
    """Return what tensors would answer that take every step at once; None for what has no result."""
    if isinstance(instruction, TakeStep):
        workers = tuple(name.worker for name in instruction.pushes)
        return StepTaken(version + 1, workers, "reference")
    return NoStep() if isinstance(instruction, LeaveOut) else None


class Table:
    """A coordinator, its members, and steps that are taken by counting them."""

    def __init__(self, mode: Consistency, workers: Sequence[str] = NAMES) -> None:
        self.coordinator = Coordinator(CoordinatorState("s", "here", mode, initialised=True))
        self.roster = self.coordinator.roster
        self.receipts: dict[WriteName, Receipt] = {}
        for worker in workers:
            self.join(worker)

    @property
    def version(self) -> int:
        return self.coordinator.version

    @property
    def deadline(self) -> float | None:
        return self.coordinator.deadline

    def join(self, worker: str, now: float = 0.0) -> None:
        self.happen(Join(worker), now)

    def leave(self, worker: str, now: float = 0.0) -> list[Decision]:
        return self.happen(Leave(worker), now)

    def switch(self, mode: Consistency, now: float) -> list[Decision]:
        return self.happen(ChangeMode(mode), now)

    def push(self, worker: str, now: float = 0.0, *, base: int | None = None, skip: bool = False) -> list[Decision]:
        """Push, and return what that decides."""
        name = WriteName(worker, self.roster.epoch(worker), self.roster.sequence(worker) + 1)
        return self.happen(Push(PushHead(name, "here", self.version if base is None else base, skip=skip), ""), now)

    def tick(self, now: float) -> list[Decision]:
        """Let time pass, and return what that decides."""
        return self.happen(Tick(), now)

    def happen(self, event: Event | Result, now: float) -> list[Decision]:
        """Let an event happen, and everything that follows from it; return what was decided about pushes."""
        decisions: list[Decision] = []
        given_up: dict[int, tuple[BarrierTimeout, list[str]]] = {}
        following: Event | Result | None = event
        while following is not None:
            instructions, following = self.coordinator.apply(following, now), None
            running = self.coordinator.state.running
            for each in instructions:
                if isinstance(each, Answer) and isinstance(each.result, BarrierTimeout):
                    given_up.setdefault(id(each.result), (each.result, []))[1].append(each.name.worker)
                elif isinstance(each, Answer) and isinstance(each.result, Receipt):
                    self.receipts[each.name] = each.result
                following = following or result_of(each, self.version)
            if running is not None and running.decision is not None:
                self.receipts = {}  # of the last decision
                decisions.append(running.decision)
        for error, workers in given_up.values():
            wanted = re.search(r"of (\d+) workers", error.detail)
            missing = error.extra["missing"]
            assert wanted is not None
            assert isinstance(missing, list)
            decisions.append(Abort(tuple(workers), int(wanted[1]), tuple(missing)))
        return decisions
