"""Workers of a session and what its mode decides about their pushes, without tensors and clocks."""

from __future__ import annotations

from collections.abc import Sequence

from farstep.consistency import Consistency
from farstep.messages import WriteName
from farstep_service.coordinator import Abort, Decision, Ledger, Pushed, Rounds, Step

NAMES = ("w0", "w1", "w2")


class Table:
    """The rounds of a mode, its members, and a version that counts steps."""

    def __init__(self, mode: Consistency, workers: Sequence[str] = NAMES) -> None:
        self.ledger, self.version = Ledger(), 0
        self.rounds = Rounds(mode, self.ledger)
        for worker in workers:
            self.join(worker)

    def join(self, worker: str, now: float = 0.0) -> None:
        self.rounds.joined(worker, self.ledger.join(worker), now)

    def leave(self, worker: str) -> None:
        self.rounds.left(worker)
        self.ledger.forget(worker)

    def push(self, worker: str, now: float = 0.0, *, base: int | None = None, skip: bool = False) -> list[Decision]:
        """Push, and return what that decides."""
        name = WriteName(worker, self.ledger.epoch(worker), self.ledger.last(worker) + 1)
        self.rounds.heard(worker, now)
        self.rounds.offer(Pushed(name, "", self.version if base is None else base, skip), now)
        return self.tick(now)

    def tick(self, now: float) -> list[Decision]:
        """Let time pass, and return what that decides."""
        decisions = []
        while (decided := self.rounds.decide(self.version, now)) is not None:
            decision, pushes = decided
            decisions.append(decision)
            if not isinstance(decision, Abort):
                self.version += isinstance(decision, Step)
                self.receipts = self.rounds.commit(decision, pushes, decision.told(self.version))
        return decisions
