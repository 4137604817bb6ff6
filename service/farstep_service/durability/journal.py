"""The journal of one session: events in order, in segment files that are taken from the disk ahead and used again.

    reserve(nbytes)    room for a payload in the present segment, which is received straight into it
    append(body)       an event; it survives the process from now on, in the kernel's memory
    sync(number)       that event, and all before it, survive a loss of power; several who wait share one call
    rotate()           the next event begins a segment
    forget(segment)    segments before one are not needed any more: a snapshot holds what they led to

    os       an append is enough                     lost with the power: what the kernel had not written by then
    group    acknowledged after `sync`               one call for all who wait
    always   acknowledged after `sync`               one call for each

A disk that is full is found before anything is acknowledged: a segment's blocks are taken when it is made.
A sync that failed is final: the journal takes nothing any more, and says so to everybody who waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, final

from farstep_service.durability.segments import (
    ALIGN,
    NO_CHAIN,
    Place,
    Reading,
    Segment,
    Written,
    chained,
    damaged,
    record_bytes,
)
from farstep_service.durability.storage import Storage
from farstep_service.failpoints import reached

Sync = Literal["os", "group", "always"]
SEGMENT_BYTES: Final = 64 << 20
"""Bytes of a segment, unless a payload needs more."""
SUFFIX: Final = ".journal"
SPARE: Final = ".spare"


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found of a journal.

    Attributes:
        number, chain: of its last event that holds.
        dropped: the name and the offset of what was torn off its end; None if nothing was.
    """

    number: int
    chain: bytes
    dropped: tuple[str, int] | None = None


@final
class Journal:
    """Write the events of one session.

    Args:
        storage: the files.
        folder: where the segments are.
        sync: when an event may be acknowledged.
        after: what was found of it, if it was there before.
        segment: the number of the first segment that is written.
        segment_bytes: the usual size of one.

    Attributes:
        number: of the last event.
        durable: of the last event that is known to be on the disk.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        sync: Sync,
        *,
        after: Recovered = Recovered(0, NO_CHAIN),
        segment: int = 1,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.sync_policy: Sync = sync
        self.number = self.durable = after.number
        self._storage = storage
        self._folder = folder
        self._chain = after.chain
        self._segment_bytes = segment_bytes
        self._syncing = threading.Lock()
        self._unsynced: list[str] = []
        self._spares: list[str] = []
        self._segment = self._begin(segment, segment_bytes)

    @property
    def segment(self) -> int:
        """Return the number of the segment that is written."""
        return self._segment.number

    def reserve(self, nbytes: int) -> tuple[Place, memoryview]:
        """Return room for a payload, and where it is.

        Raises:
            OSError: the disk has no room for it; nothing has changed.
        """
        self._make_room(nbytes)
        return self._segment.reserve(nbytes)

    def append(self, body: bytes) -> int:
        """Write an event and return its number.

        Raises:
            OSError: the disk has no room for it; nothing has changed.
        """
        self._make_room(len(body))
        number = self.number + 1
        chain = chained(self._chain, number, body)
        reached("journal.append.before")
        self._segment.append(body, number, self.durable, chain)
        self.number, self._chain = number, chain
        reached("journal.append.after")
        return number

    def sync(self, number: int) -> None:
        """Return when an event is on the disk; may be called by any thread, and waits for the disk.

        Raises:
            OSError: the disk failed, now or before. What it holds of the events that are not durable is unknown.
        """
        if number <= self.durable:
            return
        with self._syncing:
            if number <= self.durable:  # who waited shares the call of another
                return
            upto, names = self.number, [*self._unsynced]
            reached("journal.sync.before")
            for name in names:
                self._storage.sync(name)
            reached("journal.sync.after")
            del self._unsynced[: len(names) - 1]  # the last one is still written
            self.durable = max(self.durable, upto)

    def rotate(self) -> int:
        """Begin a segment and return its number.

        Raises:
            OSError: the disk has no room for it; the present one goes on.
        """
        reached("journal.rotate")
        self._segment = self._begin(self._segment.number + 1, self._segment_bytes)
        return self._segment.number

    def forget(self, segment: int) -> None:
        """Let go of the segments before one; one of the usual size is kept to be used again."""
        reached("journal.forget.before")
        for number, name in segments_in(self._storage, self._folder):
            if number >= segment:
                break
            if not self._spares and self._storage.size(name) == self._segment_bytes:
                spare = f"{self._folder}/{number:08}{SPARE}"
                self._storage.rename(name, spare)
                self._spares.append(spare)
            else:
                self._storage.remove(name)
            if name in self._unsynced:
                self._unsynced.remove(name)
        self._storage.sync_names(self._folder)
        reached("journal.forget.after")

    def _make_room(self, nbytes: int) -> None:
        if self._segment.room < nbytes:
            size = max(self._segment_bytes, ALIGN + record_bytes(nbytes) + ALIGN)
            self._segment = self._begin(self._segment.number + 1, size)

    def _begin(self, number: int, nbytes: int) -> Segment:
        name = name_of(self._folder, number)
        if self._spares and nbytes == self._segment_bytes:
            self._storage.rename(self._spares.pop(), name)
        else:
            self._storage.create(name, nbytes)
        reached("journal.begin.created")
        segment = Segment(self._storage.map(name), number, self._chain)
        reached("journal.begin.mapped")
        self._storage.sync_names(self._folder)
        reached("journal.begin.named")
        self._unsynced.append(name)
        return segment


def name_of(folder: str, segment: int) -> str:
    """Return the file name of a segment."""
    return f"{folder}/{segment:08}{SUFFIX}"


def segments_in(storage: Storage, folder: str) -> Iterator[tuple[int, str]]:
    """Yield the segments of a folder, in their order."""
    for each in storage.names(folder):
        stem = each.removesuffix(SUFFIX)
        if stem != each and stem.isdecimal():
            yield int(stem), f"{folder}/{each}"


@final
class JournalReader:
    """Read the events of a journal that follow a point.

    Args:
        storage, folder: as of a `Journal`.
        number, chain: of the last event before the point.
        segment: the first segment to read.

    Attributes:
        found: what was found, once `events` has come to its end.
    """

    def __init__(self, storage: Storage, folder: str, number: int, chain: bytes, segment: int) -> None:
        self.found = Recovered(number, chain)
        self._readings = [
            (each, Reading(storage.map(name, writable=False), name))
            for each, name in segments_in(storage, folder)
            if each >= segment
        ]

    def events(self) -> Iterator[Written]:
        """Go through the events that hold.

        Raises:
            DamagedJournal: one does not that was on the disk.
        """
        number, chain = self.found.number, self.found.chain
        for place, (segment, reading) in enumerate(self._readings):
            end = ALIGN
            if reading.number == segment and reading.chain == chain:
                for event in reading.events(number + 1, chain):
                    number, chain, end = event.number, event.chain, event.end
                    yield event
            if self._goes_on(place, chain):
                continue
            behind = max(
                (each.durable_behind(end if each is reading else ALIGN) for _, each in self._readings[place:]),
                default=0,
            )
            if behind > number:
                raise damaged(reading.name, end, f"event {number + 1} is not there")
            torn = (reading.name, end) if behind or place + 1 < len(self._readings) else None
            self.found = Recovered(number, chain, torn)
            return
        self.found = Recovered(number, chain)

    def payload(self, place: Place) -> memoryview:
        """Return the bytes of a payload.

        Raises:
            DamagedJournal: there is no such place.
        """
        for segment, reading in self._readings:
            if segment == place.segment:
                return reading.extent(place)
        raise damaged(f"segment {place.segment}", place.offset, "it is not there, and an event needs it")

    def _goes_on(self, place: int, chain: bytes) -> bool:
        """Return whether the next segment follows on what was read so far."""
        if place + 1 == len(self._readings):
            return False
        (segment, _), (following, reading) = self._readings[place], self._readings[place + 1]
        return following == segment + 1 and reading.number == following and reading.chain == chain
