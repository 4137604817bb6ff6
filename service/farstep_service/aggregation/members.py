"""Who takes part in a session: the workers that joined, and whose place may be taken.

A mode has room for a number of workers, or for any. A worker that was missing when a barrier timed out keeps its place
until another one asks for it. Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable

from farstep.errors import SessionFull


class Members:
    """The workers of one session, by name, with their epochs.

    Args:
        places: how many workers there is room for, None for any number.
    """

    def __init__(self, places: int | None) -> None:
        self._places = places
        self._epochs: dict[str, int] = {}
        self._absent: set[str] = set()

    def __contains__(self, worker: str) -> bool:
        return worker in self._epochs

    def names(self) -> list[str]:
        """Return the workers in the order of their names."""
        return sorted(self._epochs)

    def epoch(self, worker: str) -> int:
        """Return the epoch a worker joined with, 0 if it is not a member."""
        return self._epochs.get(worker, 0)

    def make_room(self, worker: str) -> str | None:
        """Make sure that `worker` finds a place; return the absent worker who loses his for it, if need be.

        Raises:
            SessionFull: every place is taken by a worker that is present.
        """
        if worker in self._epochs or self._places is None or len(self._epochs) < self._places:
            return None
        if not self._absent:
            raise SessionFull(
                f"All {self._places} places of this session are taken: {', '.join(sorted(self._epochs))}.",
                remedy="Join under the name of the worker you replace, or let one leave.",
                field="worker",
                limit=self._places,
            )
        displaced = min(self._absent)
        self.leave(displaced)
        return displaced

    def join(self, worker: str, epoch: int) -> None:
        """Note that a worker joined."""
        self._epochs[worker] = epoch
        self._absent.discard(worker)

    def leave(self, worker: str) -> None:
        """Give a worker's place up."""
        self._epochs.pop(worker, None)
        self._absent.discard(worker)

    def seen(self, worker: str) -> None:
        """Note that a worker is there."""
        self._absent.discard(worker)

    def missed(self, present: Iterable[str]) -> list[str]:
        """Note who was missing when only these were there, and return their names."""
        missing = sorted(set(self._epochs) - set(present))
        self._absent |= set(missing)
        return missing
