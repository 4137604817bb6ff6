"""Who knows which param groups of a session that grows.

    worker X adds group i      X knows it, every other worker knows groups 0 to i-1 until it adds the same group
    a worker that lags         gets the receipts of what it wrote before; anything new is refused, naming X and i
    it adds group i            it knows one more
    it joins again             it has named all groups, or could not have joined

Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable


class KnownGroups:
    """Remember which workers lag behind the groups of one session, and who added them."""

    def __init__(self) -> None:
        self._added_by: dict[int, str] = {}
        self._known: dict[str, int] = {}

    def lag(self, worker: str) -> tuple[int, str] | None:
        """Return how many groups a worker knows and who added the next one; None for one that knows all."""
        known = self._known.get(worker)
        return None if known is None else (known, self._added_by[known])

    def added(self, group: int, by: str, others: Iterable[str]) -> None:
        """Note that a worker added a group: these others do not know it."""
        self._added_by[group] = by
        for worker in others:
            if worker != by:
                self._known.setdefault(worker, group)

    def learned(self, worker: str, group: int) -> None:
        """Note that a worker added a group that is there already."""
        if self._known.get(worker) == group:
            self._known[worker] = group + 1
            if group + 1 not in self._added_by:
                del self._known[worker]

    def joined(self, worker: str) -> None:
        """Note that a worker joined with all groups, or left."""
        self._known.pop(worker, None)
