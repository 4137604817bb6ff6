"""Who comes to one session and who goes: the push that waits of a worker that is shut out is taken back.

`Membership` keeps places, epochs and known param groups; here is what that means to the pushes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from farstep.errors import Fenced
from farstep.growth import AppendHead
from farstep_service.session.membership import Membership
from farstep_service.session.outcomes import Outcomes
from farstep_service.session.pushes import Pushes


@final
class Attendance:
    """Let workers in and shut them out.

    Args:
        membership: who takes part.
        pushes: what waits of them.
    """

    def __init__(self, membership: Membership, pushes: Pushes) -> None:
        self._membership = membership
        self._pushes = pushes

    def join(self, worker: str, now: float, *, named: bool = True) -> tuple[int, Outcomes]:
        """Open a new epoch of a worker, and return it and what that decided; see `Membership.join`."""
        outcomes = self._withdraw(worker, "joined again", "If that was another process, give each its own name.", now)
        epoch = self._membership.join(worker, now, named=named)
        self._pushes.left(worker)
        return epoch, outcomes | self._pushes.tick(now)

    def leave(self, worker: str, now: float) -> Outcomes:
        """Give a worker's place up."""
        outcomes = self._withdraw(worker, "left", "Join again to go on.", now)
        self._membership.leave(worker)
        self._pushes.left(worker)
        return outcomes | self._pushes.tick(now)

    def added(self, head: AppendHead, workers: Sequence[str], now: float) -> Outcomes:
        """Shut every worker out that does not know the group that one of them has added."""
        self._membership.known.added(head.group, head.name, workers)
        outcomes: Outcomes = {}
        for other in workers:
            if error := self._membership.outgrown(other):
                outcomes |= self._pushes.withdraw(other, error, now)
        return outcomes

    def _withdraw(self, worker: str, why: str, remedy: str, now: float) -> Outcomes:
        what = f"Worker {worker!r} {why} while this push waited; it was not applied."
        error = Fenced(what, remedy=remedy, field="epoch")
        return self._pushes.withdraw(worker, error, now)
