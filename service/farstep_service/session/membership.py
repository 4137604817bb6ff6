"""Who takes part in one session: what joining and leaving mean to its places, its ledger and its param groups."""

from __future__ import annotations

from typing import final

from farstep.consistency import Consistency
from farstep.errors import Fenced
from farstep.growth import outgrown
from farstep.messages import WriteName
from farstep_service.coordinator import KnownGroups, Ledger, Rounds, places_of
from farstep_service.layout import Layout


@final
class Membership:
    """Keep members, epochs and known param groups of one session consistent with each other.

    Args:
        session: its name.
        rounds: who has joined, and what waits of them.
        ledger: where epochs begin.

    Attributes:
        known: which groups each of the members knows.
    """

    def __init__(self, session: str, rounds: Rounds, ledger: Ledger) -> None:
        self.known = KnownGroups()
        self._session = session
        self._rounds = rounds
        self._ledger = ledger

    def join(self, worker: str, now: float, *, named: bool = True) -> int:
        """Open a new epoch of a worker that knows all groups, fencing its older one, and return it.

        Whatever waited of it has been withdrawn.

        Raises:
            SessionFull: the mode's places are taken by workers that are live.
        """
        members = self._rounds.members
        self._rounds.sweep(now)
        for gone in {*members.make_room(worker), *members.forgotten(now)} - {worker}:
            self.leave(gone)
        epoch = self._ledger.join(worker)
        self.known.joined(worker)
        self._rounds.joined(worker, epoch, now, named=named)
        return epoch

    def leave(self, worker: str) -> None:
        """Give a worker's place up; what it sends from now on is refused, until it joins again."""
        self.known.joined(worker)
        self._rounds.left(worker)
        self._ledger.forget(worker)

    def make_fit(self, mode: Consistency, now: float) -> None:
        """Make sure that another mode has a place for every member; lapsed ones without a place leave.

        Raises:
            SessionFull: there are more live workers than it has places for; nothing has changed then.
        """
        self._rounds.sweep(now)
        for gone in self._rounds.members.surplus(places_of(mode)):
            self.leave(gone)

    def layout_at(self, name: WriteName, layout: Layout) -> Layout:
        """Return the part of the session's layout that a worker knew when it made a write."""
        known = self.known.at(name)
        return layout if known is None else layout.first(known)

    def groups(self, worker: str, count: int) -> int:
        """Return how many of the session's `count` groups a worker knows."""
        lag = self.known.lag(worker)
        return count if lag is None else lag[0]

    def outgrown(self, worker: str) -> Fenced | None:
        """Return the error for a worker that does not know all groups, None for one that does."""
        lag = self.known.lag(worker)
        return None if lag is None else outgrown(self._session, worker, lag[0], by=lag[1])
