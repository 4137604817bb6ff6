"""How large a session's journal is: its segments, and when a snapshot takes its place.

A data directory holds up to `WINDOWS` times `rotate_bytes` of a session: the events behind its last snapshot, those
behind the one before, and segments that wait to be used again, so that a steady session makes no new files.
"""

from __future__ import annotations

from typing import Final

from farstep.protocol.durability import Sync
from farstep_service.durability.journal import NOTHING, Journal
from farstep_service.durability.reading import Recovered
from farstep_service.durability.storage import Storage
from farstep_service.plan import Plan

SMALLEST_SEGMENT: Final = 256 << 10
LARGEST_SEGMENT: Final = 16 << 20
SMALL_PUSHES: Final = 16
"""Pushes of a small session that go into one segment: to begin one takes the disk a moment."""
PUSHES: Final = 4
"""Pushes of a large session that go into one segment, if that is not too large."""
LARGEST_OF_PUSHES: Final = 1 << 30
ROTATE_BYTES: Final = 32 << 20
"""A session's journal is at least so large before a snapshot takes its place."""
STATES: Final = 8
"""A session's journal is so many times its parameters and state before a snapshot takes its place: a restart reads
that much again, and a snapshot is written that much less often."""
WINDOWS: Final = 3
"""See above."""


def begin_journal(
    storage: Storage,
    folder: str,
    sync: Sync,
    plan: Plan,
    *,
    after: Recovered | None = None,
    segment: int | None = None,
) -> Journal:
    """Begin to write the journal of a session.

    Args:
        storage, folder, sync, segment: see `Journal`.
        plan: what the session is.
        after: what was found of it; None for a new one.

    Raises:
        OSError: the disk has no room for it.
    """
    return Journal(
        storage,
        folder,
        sync,
        after=after or NOTHING,
        segment=segment,
        segment_bytes=segment_bytes(plan),
        lazily=after is not None,  # what only comes back writes nothing
    )


def segment_bytes(plan: Plan) -> int:
    """Return the usual size of a segment: several pushes, and little for a small session."""
    one = plan.layout.nbytes + (8 << 10)
    several = one * max(1, min(PUSHES, LARGEST_OF_PUSHES // one)) + SMALLEST_SEGMENT
    is_large = SMALL_PUSHES * one > LARGEST_SEGMENT
    return several if is_large else max(SMALLEST_SEGMENT, SMALL_PUSHES * one)


def rotate_bytes(plan: Plan, most_bytes: int) -> int:
    """Return how large the journal becomes before a snapshot takes its place."""
    state = plan.layout.nbytes * (1 + len(plan.rule.tensor_fields))
    return min(max(ROTATE_BYTES, STATES * state), most_bytes // WINDOWS)
