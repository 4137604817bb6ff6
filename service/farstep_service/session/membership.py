"""Who takes part in one session: what joining and leaving mean to its places, its ledger and its param groups."""

from __future__ import annotations

from typing import final

from farstep.errors import Fenced
from farstep.growth import outgrown
from farstep.messages import WriteName
from farstep_service.aggregation import KnownGroups, Ledger, Members
from farstep_service.layout import Layout


@final
class Membership:
    """Keep members, epochs and known param groups of one session consistent with each other.

    Args:
        session: its name.
        places: how many workers there is room for, None for any number.
        ledger: where epochs begin.

    Attributes:
        members: who has joined.
        known: which groups each of them knows.
    """

    def __init__(self, session: str, places: int | None, ledger: Ledger) -> None:
        self.members = Members(places)
        self.known = KnownGroups()
        self._session = session
        self._ledger = ledger

    def join(self, worker: str) -> int:
        """Open a new epoch of a worker that knows all groups, fencing its older one, and return it.

        Raises:
            SessionFull: the mode's places are taken by workers that are present.
        """
        displaced = self.members.make_room(worker)
        if displaced is not None:
            self._fence(displaced)  # its place is another's now
        epoch = self._fence(worker)
        self.members.join(worker, epoch)
        return epoch

    def leave(self, worker: str) -> None:
        """Give a worker's place up."""
        self.members.leave(worker)
        self._fence(worker)

    def _fence(self, worker: str) -> int:
        """Begin an epoch in which the worker has written nothing, so that what it sends in an older one is refused."""
        self.known.joined(worker)
        return self._ledger.join(worker)

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
