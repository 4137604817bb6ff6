"""Read the journal of a session: the events that hold, and where and why they end.

Where a segment begins with the chain that was reached, reading goes on there, in the last of them if there are several:
what an earlier recovery dropped stays dropped. Where none does, the journal ends, or it is damaged (`segments` says
which).

An event holds if its record does, and if the payload that it names does; the caller knows which payload that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, final

import xxhash

from farstep_service.durability.segments import (
    ALIGN,
    EVENT,
    EXTENT,
    FIRST,
    MARK,
    MARK_MAGIC,
    NO_CHAIN,
    RECORD_HEAD,
    RECORD_MAGIC,
    SEGMENT_HEAD,
    SEGMENT_MAGIC,
    VERSION,
    Place,
    Written,
    boot_name,
    chained,
    damaged,
    record_bytes,
    with_checksum,
)
from farstep_service.durability.storage import Storage

SUFFIX: Final = ".journal"
_NO_MAGIC: Final = bytes(len(RECORD_MAGIC))
_SEARCHED: Final = 1 << 20
"""Bytes that are searched at a time for records."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found of a journal.

    Attributes:
        number, chain: of its last event that holds.
        dropped: the name and the offset of what was torn off its end; None if nothing was.
        lost: the highest number of an event that is still there behind that; 0 for none.
        rebooted: whether the machine was started since the last segment was begun, or that is not known: then events
            that were not synced may be missing without a trace.
        segment: a number behind those of all segments that are there.
    """

    number: int
    chain: bytes
    dropped: tuple[str, int] | None = None
    lost: int = 0
    rebooted: bool = False
    segment: int = 1


class _Found(NamedTuple):
    kind: int
    nbytes: int
    number: int
    durable: int
    chain: bytes


@final
class Reading:
    """One segment that is read.

    Args:
        memory: its bytes.
        name: its file, for errors.
        number: its number, by its name.
        boot: `boot_name` of now.

    Attributes:
        name, number: as above.
        begun: whether it holds what was written under this number; if not, nothing of it was ever on the disk.
        chain: the chain before its first event.
        same_boot: whether the machine has kept its memory since it was begun.

    Raises:
        DamagedJournal: its head is damaged, or it is not as long as it was made.
    """

    def __init__(self, memory: memoryview, name: str, number: int, boot: bytes) -> None:
        self.name = name
        self.number = number
        self.begun = self.same_boot = False
        self.chain = NO_CHAIN
        self._memory = memory
        self._seed = 0
        if len(memory) < FIRST + ALIGN:
            raise damaged(name, len(memory), "it was cut off here")
        packed = bytes(memory[:ALIGN])
        if not any(packed):
            return
        magic, version, size, its_number, salt, its_boot, chain, _ = SEGMENT_HEAD.unpack(packed)
        if packed != with_checksum(packed) or magic != SEGMENT_MAGIC:
            raise damaged(name, 0, "its head does not hold")
        if version != VERSION:
            raise damaged(name, 0, f"it has the format {version}, and this release reads {VERSION}")
        if its_number != number:  # an earlier use; the new head never reached the disk
            return
        if len(memory) != size * ALIGN:
            raise damaged(name, len(memory), f"it was cut off here, and had {size * ALIGN:,} bytes")
        self.begun, self.chain, self._seed = True, chain, int.from_bytes(salt, "little")
        self.same_boot = any(boot) and boot == its_boot

    def events(self, number: int, chain: bytes) -> Iterator[Written]:
        """Go through the events that hold, the first of which is to be `number`, with the chain before it."""
        at = FIRST
        while (found := self._at(at)) is not None:
            behind = at + record_bytes(found.nbytes)
            if found.kind == EVENT:
                body = bytes(self._memory[at + ALIGN : at + ALIGN + found.nbytes])
                if found.number != number or chained(chain, number, body) != found.chain:
                    return
                chain = found.chain
                yield Written(number, body, chain, self.number, behind)
                number += 1
            elif found.number != at:
                return
            at = behind

    def is_end(self, at: int) -> bool:
        """Return whether the next record was to go there, and none is: extents that no event names are passed over."""
        while (found := self._at(at)) is not None and found.kind == EXTENT and found.number == at:
            at += record_bytes(found.nbytes)
        return at + ALIGN > len(self._memory) or self._memory[at : at + len(_NO_MAGIC)] == _NO_MAGIC

    def behind(self, at: int) -> tuple[int, int]:
        """Look for what was written later: from an offset on, and in the mark.

        Returns:
            The highest number of an event, and the number up to which events were on the disk; 0 for none.
        """
        highest, durable = 0, self._marked()
        for base in range(at, len(self._memory) - ALIGN + 1, _SEARCHED):
            part = bytes(self._memory[base : base + _SEARCHED])
            place = part.find(RECORD_MAGIC)
            while place >= 0:
                found = self._at(base + place) if (base + place) % ALIGN == 0 else None
                if found is not None and found.kind == EVENT:
                    highest, durable = max(highest, found.number), max(durable, found.durable)
                place = part.find(RECORD_MAGIC, place + 1)
        return highest, durable

    def extent(self, place: Place) -> memoryview:
        """Return the bytes of a payload.

        Raises:
            DamagedJournal: it reaches beyond the segment.
        """
        if place.offset + place.nbytes > len(self._memory):
            raise damaged(self.name, place.offset, "a payload reaches beyond its end")
        return self._memory[place.offset : place.offset + place.nbytes]

    def _marked(self) -> int:
        magic, durable, checksum = MARK.unpack_from(self._memory, ALIGN)
        packed = bytes(self._memory[ALIGN : ALIGN + MARK.size - 8])
        holds = self.begun and magic == MARK_MAGIC and xxhash.xxh3_64(packed, seed=self._seed).intdigest() == checksum
        return int(durable) if holds else 0

    def _at(self, at: int) -> _Found | None:
        """Return the head of a record, None where there is none that holds."""
        if not self.begun or at + ALIGN > len(self._memory):
            return None
        packed = bytes(self._memory[at : at + ALIGN])
        magic, kind, nbytes, number, durable, chain, checksum = RECORD_HEAD.unpack(packed)
        if magic != RECORD_MAGIC or xxhash.xxh3_64(packed[:48], seed=self._seed).intdigest() != checksum:
            return None
        if at + record_bytes(nbytes) > len(self._memory):
            return None
        return _Found(kind, nbytes, number, durable, chain)


@final
class JournalReader:
    """Read the events of a journal that follow a point.

    Args:
        storage, folder: as of a `Journal`.
        number, chain: of the last event before the point.
        segment: the first segment to read; the events that follow the point begin in it or in a later one.
        before: segments from this one on are not read; None for all.

    Attributes:
        found: what was found, once `events` has come to its end.

    Raises:
        DamagedJournal: a segment is no segment, or was cut off.
    """

    def __init__(
        self, storage: Storage, folder: str, number: int, chain: bytes, segment: int, before: int | None = None
    ) -> None:
        boot = boot_name(storage.boot)
        there = [*segments_in(storage, folder)]
        self._readings = [
            Reading(storage.map(name, writable=False), name, each, boot)
            for each, name in there
            if each >= segment and (before is None or each < before)
        ]
        begun = [each for each in self._readings if each.begun]
        self.found = Recovered(
            number,
            chain,
            rebooted=not begun or not begun[-1].same_boot,
            segment=max((each for each, _ in there), default=0) + 1,
        )
        self._begins = {each.chain: place for place, each in enumerate(self._readings) if each.begun}

    def events(self, holds: Callable[[Written], bool] = lambda _: True) -> Iterator[Written]:
        """Go through the events that hold.

        Args:
            holds: returns whether the payload of an event is what it was.

        Raises:
            DamagedJournal: one does not that was on the disk, or, if the machine has not been started since, at all.
        """
        number, chain = self.found.number, self.found.chain
        at, end, whole = -1, FIRST, True
        following = self._begins.get(chain, -1)
        while following > at:
            at, end = following, FIRST
            for event in self._readings[at].events(number + 1, chain):
                if not holds(event):
                    whole = False
                    break
                number, chain, end = event.number, event.chain, event.end
                yield event
                if (following := self._begins.get(chain, -1)) > at:
                    break
        self.found = self._ended(number, chain, at, end, whole=whole)

    def payload(self, place: Place) -> memoryview:
        """Return the bytes of a payload.

        Raises:
            DamagedJournal: there is no such place.
        """
        for reading in self._readings:
            if reading.number == place.segment:
                return reading.extent(place)
        raise damaged(f"segment {place.segment}", place.offset, "it is not there, and an event needs it")

    def _ended(self, number: int, chain: bytes, at: int, end: int, *, whole: bool) -> Recovered:
        """Return what was found, if it is legal that nothing was behind.

        Args:
            number, chain: of the last event that holds.
            at, end: the place among the readings of the segment where reading ended, and the offset; -1 for none.
            whole: whether the payload of the next event held.
        """
        behind = [(each, *each.behind(end if place == at else FIRST)) for place, each in self._after(at)]
        lost = max((highest for _, highest, _ in behind if highest > number), default=0)
        clean = whole and not lost and (at < 0 or self._readings[at].is_end(end))
        kept = any(each.same_boot for each, highest, _ in behind if highest > number)
        kept |= not clean and at >= 0 and self._readings[at].same_boot
        if kept or max((durable for *_, durable in behind), default=0) > number:
            name = self._readings[max(at, 0)].name
            raise damaged(name, end, f"event {number + 1} does not hold, or what came with it, and it was written")
        name = self._readings[max(at, 0)].name if self._readings else ""
        dropped = None if clean else (name, end)
        return Recovered(number, chain, dropped, lost, self.found.rebooted, self.found.segment)

    def _after(self, at: int) -> Iterator[tuple[int, Reading]]:
        return ((place, each) for place, each in enumerate(self._readings) if place >= at and each.begun)


def name_of(folder: str, segment: int) -> str:
    """Return the file name of a segment."""
    return f"{folder}/{segment:08}{SUFFIX}"


def segments_in(storage: Storage, folder: str) -> Iterator[tuple[int, str]]:
    """Yield the segments of a folder, in their order."""
    for each in storage.names(folder):
        stem = each.removesuffix(SUFFIX)
        if stem != each and stem.isdecimal():
            yield int(stem), f"{folder}/{each}"
