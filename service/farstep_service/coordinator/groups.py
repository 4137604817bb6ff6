"""Who knows which param groups of a session that grows.

    worker X adds group i      X knows it from this write on, every other worker knows groups 0 to i-1
    a worker that lags         gets the receipts of what it wrote before; anything new is refused, naming X and i
    it adds group i            it knows one more from this write on
    it joins again             it has named all groups, or could not have joined

What a worker knew when it made a write decides how large that write is, also when it arrives once more much later.
Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from farstep.messages import WriteName


class KnownGroups:
    """Remember which workers lag behind the groups of one session, and who added them."""

    def __init__(self) -> None:
        self._added_by: dict[int, str] = {}
        self._lagging: dict[str, int] = {}
        self._learned: dict[str, list[tuple[int, int]]] = {}  # by worker: (sequence, group), ascending

    def lag(self, worker: str) -> tuple[int, str] | None:
        """Return how many groups a worker knows and who added the next one; None for one that knows all."""
        known = self._lagging.get(worker)
        return None if known is None else (known, self._added_by[known])

    def at(self, name: WriteName) -> int | None:
        """Return how many groups a worker knew when it made a write of its present epoch; None for all there are."""
        learned = self._learned.get(name.worker, ())
        later = bisect_right(learned, name.sequence, key=lambda each: each[0])
        return learned[later][1] if later < len(learned) else self._lagging.get(name.worker)

    def added(self, group: int, by: WriteName, others: Iterable[str]) -> None:
        """Note that a worker added a group: these others do not know it."""
        self._added_by[group] = by.worker
        self._learned.setdefault(by.worker, []).append((by.sequence, group))
        for worker in others:
            if worker != by.worker:
                self._lagging.setdefault(worker, group)

    def learned(self, group: int, name: WriteName) -> None:
        """Note that a worker added a group that is there already; nothing happens if it knew it."""
        if self._lagging.get(name.worker) == group:
            self._learned.setdefault(name.worker, []).append((name.sequence, group))
            self._lagging[name.worker] = group + 1
            if group + 1 not in self._added_by:
                del self._lagging[name.worker]

    def joined(self, worker: str) -> None:
        """Note that a worker joined with all groups, or left."""
        self._lagging.pop(worker, None)
        self._learned.pop(worker, None)
