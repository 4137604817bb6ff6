"""When the next snapshot of a session is due.

snapshot    so many steps after the last one, or so many seconds
journal     when it has become so large (`journal_size`), or when it is about to fill the disk
"""

from __future__ import annotations

from typing import Final, final

from farstep.protocol.durability import Durability, Snapshot
from farstep_service.durability.journal import Journal
from farstep_service.durability.storage import Storage
from farstep_service.keeping.journal_size import WINDOWS, rotate_bytes, segment_bytes
from farstep_service.session import Session

MOST_EVENTS: Final = 8192
"""Events and results after which a snapshot is due: a restart reads several thousand again in a second."""


@final
class Due:
    """Say when a snapshot of one session is due.

    Args:
        session: the session.
        level: how it is kept.
        storage: where to.
        most_bytes: the most bytes of its journal.
    """

    def __init__(self, session: Session, level: Durability, storage: Storage, most_bytes: int) -> None:
        self._session, self._level, self._storage, self._most_bytes = session, level, storage, most_bytes
        self._version, self._at = session.version, 0.0
        self._sized = session.plan
        self._rotate_bytes, self._segment_bytes = rotate_bytes(self._sized, most_bytes), segment_bytes(self._sized)
        self._looked_at = 0

    def saved(self, version: int, at: float) -> None:
        """Note that a snapshot has a version, and the time at which it was made."""
        self._version, self._at, self._looked_at = version, at, 0

    def left_s(self, now: float, journal: Journal | None) -> float | None:
        """Return the seconds until one is due after a write: 0 for now, None where time alone does not decide."""
        level = self._level
        if isinstance(level, Snapshot):
            if level.every_steps is not None and self._session.version - self._version >= level.every_steps:
                return 0
            return None if level.every_s is None else max(0, self._at + level.every_s - now)
        if journal is None:
            return None
        self._measure()
        grown = journal.since_rotation
        if grown >= self._rotate_bytes or journal.number - journal.rotated >= MOST_EVENTS:
            return 0
        return 0 if grown >= self._looked_at and self._is_short(grown) else None

    def most_bytes(self) -> int:
        """Return how large a journal may be while a snapshot is written."""
        self._measure()
        return (WINDOWS + 1) * self._rotate_bytes

    def has_little_room(self) -> bool:
        """Return whether the disk has no room for two more segments and snapshots."""
        self._measure()
        return self._storage.free_bytes() < 2 * (self._segment_bytes + self._session.held_bytes)

    def _measure(self) -> None:
        """Count again if the session has grown."""
        if self._sized is not (plan := self._session.plan):
            self._sized = plan
            self._rotate_bytes, self._segment_bytes = rotate_bytes(plan, self._most_bytes), segment_bytes(plan)

    def _is_short(self, grown: int) -> bool:
        """Return whether the disk is nearly full; it is looked at once for each segment that is written."""
        self._looked_at = grown + self._segment_bytes
        return grown >= self._segment_bytes and self.has_little_room()
