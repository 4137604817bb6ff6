"""The pushes of one session that wait, and what becomes of them: the mode, the members and the ledger put together.

    heard, joined, left    who takes part; what waits of a worker that left or joined anew is withdrawn
    offer                  a push that `seen` and `holds` do not know comes in
    decide                 the next decision; asked for after each event, until there is none
    commit, refuse         a decision was acted on: its pushes get their receipts, in the ledger for ever
    drop                   it was not: its pushes get errors, and their sequences are free
    switch                 another mode goes on with the pushes that wait

Between `decide` and what follows it, its pushes belong to whoever acts. Pure: no clock, no lock, no I/O, no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from typing import assert_never, final

from farstep.consistency import Async, Bounded, Consistency, Sync
from farstep.messages import WriteName
from farstep.receipt import Receipt
from farstep_service.coordinator.ledger import Ledger, mismatch
from farstep_service.coordinator.members import Members
from farstep_service.coordinator.modes.bounded import Window
from farstep_service.coordinator.modes.decisions import Decision, Pushed, Refuse, Skip, Step
from farstep_service.coordinator.modes.mode import Aggregation, Immediate
from farstep_service.coordinator.modes.sync import Barrier

Receipts = dict[WriteName, Receipt]


@final
class Rounds:
    """Hold the pushes that wait, at most one of a worker, and decide about them.

    Args:
        mode: how pushes become steps.
        ledger: where receipts are kept.

    Attributes:
        members: who takes part.
    """

    def __init__(self, mode: Consistency, ledger: Ledger) -> None:
        self.members = Members(places_of(mode), mode.lease_s)
        self._ledger = ledger
        self._aggregation = aggregation_for(mode, self.members)
        self._waiting: dict[str, Pushed] = {}

    def __contains__(self, worker: str) -> bool:
        return worker in self._waiting

    def holds(self, name: WriteName, fingerprint: str) -> bool:
        """Say whether a push waits already.

        Raises:
            IdempotencyMismatch: its worker has another one waiting.
        """
        earlier = self._waiting.get(name.worker)
        if earlier is not None and earlier.fingerprint != fingerprint:
            raise mismatch(name)
        return earlier is not None

    # -- who takes part ---------------------------------------------------------------------------------------------

    def heard(self, worker: str, now: float) -> None:
        """Renew the lease of a member."""
        self.sweep(now)
        if self.members.heard(worker, now):
            self._aggregation.returned(worker)

    def joined(self, worker: str, epoch: int, now: float, *, named: bool = True) -> None:
        """Note that a worker joined, in a new epoch; what waited of an older one has been withdrawn."""
        self.sweep(now)
        self.left(worker)
        self.members.join(worker, epoch, now, named=named)
        self._aggregation.joined(worker)

    def left(self, worker: str) -> None:
        """Note that a worker, of which nothing waits, is not a member any more."""
        if worker in self.members:
            self._aggregation.left(worker)
            self.members.leave(worker)

    def sweep(self, now: float) -> None:
        """Let the leases that have run out lapse."""
        if lapsed := self.members.sweep(now):
            self._aggregation.lapsed(lapsed)

    # -- pushes -----------------------------------------------------------------------------------------------------

    def offer(self, push: Pushed, now: float) -> None:
        """Add the push of a member who was just heard of."""
        self._waiting[push.worker] = push
        self.members.wait(push.worker)
        self._aggregation.offer(push, now)

    def withdraw(self, worker: str, now: float) -> Pushed | None:
        """Take the push of a worker that waits out and return it, None if there is none."""
        push = self._waiting.pop(worker, None)
        if push is not None:
            self._aggregation.withdraw(worker)
            self.members.answered(worker, now)
        return push

    def decide(self, version: int, now: float) -> tuple[Decision, list[Pushed]] | None:
        """Return the next decision and the pushes it is about, which do not wait any more; None if there is none."""
        self.sweep(now)
        decision = self._aggregation.decide(version, now)
        if decision is None:
            return None
        pushes = [self._waiting.pop(worker) for worker in decision.workers]
        for push in pushes:
            self.members.answered(push.worker, now)
        if not isinstance(decision, Refuse):
            for worker in decision.without:
                self.members.lapse(worker, now)
            self._aggregation.lapsed(decision.without)
        return decision, pushes

    @property
    def deadline(self) -> float | None:
        """Return the time at which `decide` may have something to decide without another event."""
        return self._aggregation.deadline

    def commit(
        self, decision: Step | Skip | Refuse, pushes: Sequence[Pushed], told: Receipt, weights: Sequence[float] = ()
    ) -> Receipts:
        """Record what was done about pushes and return their receipts.

        Args:
            decision, pushes: what `decide` returned.
            told: what their workers are told alike; base, staleness and weight are each one's own.
            weights: what the gradient of each push counted; 1 if there are none.
        """
        receipts: Receipts = {}
        before = told.version - told.applied
        for push, weight in zip(pushes, weights or repeat(1.0)):  # noqa: B905  # one is endless
            receipt = replace(told, base=push.base, staleness=before - push.base, weight=weight)
            self._ledger.commit(push.name, push.fingerprint, receipt)
            receipts[push.name] = receipt
        if not isinstance(decision, Refuse):
            self._aggregation.completed(decision, told.version)
        return receipts

    # -- modes ------------------------------------------------------------------------------------------------------

    def switch(self, mode: Consistency, now: float) -> None:
        """Go on in another mode, which is offered the pushes that wait in the order of their workers' names.

        Their deadlines, and all leases, begin anew. Members that the mode has no places for have left before.
        """
        self.sweep(now)
        self.members.change(places_of(mode), mode.lease_s, now)
        self._aggregation = aggregation_for(mode, self.members)
        for worker in sorted(self._waiting):
            self._aggregation.offer(self._waiting[worker], now)


def places_of(mode: Consistency) -> int | None:
    """Return how many workers a mode has room for, None for any number."""
    return mode.workers if isinstance(mode, Sync) and mode.workers != "live" else None


def aggregation_for(mode: Consistency, members: Members) -> Aggregation:
    """Return a fresh state machine for a consistency mode."""
    match mode:
        case Async():
            return Immediate(members)
        case Sync():
            return Barrier(mode, members)
        case Bounded():
            return Window(mode, members)
        case _:
            assert_never(mode)
