"""The file format of a journal: segments of records, which survive being cut off, and in which no damage goes unseen.

    segment    head (64 bytes) record record ... zeros, or what an earlier use of the file left
    record     head (64 bytes) body, padded to a multiple of 64
    event      a body of bytes that a session is replayed from
    extent     room for a payload, which is received straight into it; an event says where it is and what it holds

    head of a segment    farstepJ  version  number  salt(16)  chain(16)  checksum(8)
    head of a record     frec  kind  nbytes(8)  number(8)  durable(8)  chain(16)  checksum(8)  0(8)

All numbers are little-endian. `salt` is drawn anew each time that a file becomes a segment, and seeds the checksums of
its heads: what an earlier use left behind is not read. `chain` of an event is xxh3_128 over the chain of the event
before, its number and its body: an event that was changed, left out, repeated or moved breaks it. `number` counts the
events of a journal from 1; `durable` is the number up to which events were known to be on the disk when this one was
written.

Where a record does not hold, reading asks whether anything behind it was written later:

    nothing behind it                                the end was torn off: it was never acknowledged, and is dropped
    an event whose `durable` is below its number     the disk had not yet been told to keep it: the same
    an event whose `durable` is not                  it was on the disk, and is damaged: the journal is refused
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, final

import xxhash

from farstep.errors import FarstepError
from farstep_service.failpoints import reached

ALIGN: Final = 64
"""Bytes of a head, and what bodies are padded to."""
VERSION: Final = 1
EVENT: Final = 1
EXTENT: Final = 2
_SEGMENT: Final = struct.Struct("<8sIIQ16s16sQ")
_RECORD: Final = struct.Struct("<4sB3xQQQ16sQQ")
_SEGMENT_MAGIC: Final = b"farstepJ"
_RECORD_MAGIC: Final = b"frec"
NO_CHAIN: Final = bytes(16)
"""The chain before the first event of a journal."""


class DamagedJournal(FarstepError):
    """A journal holds a damaged record before one that is whole."""

    code = "damaged_journal"
    status = 500


class Place(NamedTuple):
    """Name a stretch of a journal: the number of its segment, where it begins there, and its size."""

    segment: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """An event as it was found.

    Attributes:
        number: its number.
        body: its bytes.
        chain: the chain after it.
        segment, end: where the next record begins.
    """

    number: int
    body: bytes
    chain: bytes
    segment: int
    end: int


def padded(nbytes: int) -> int:
    """Return a size rounded up to a multiple of `ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


def record_bytes(nbytes: int) -> int:
    """Return the bytes that a record with such a body takes."""
    return ALIGN + padded(nbytes)


def chained(before: bytes, number: int, body: bytes | memoryview) -> bytes:
    """Return the chain after an event."""
    digest = xxhash.xxh3_128(before)
    digest.update(number.to_bytes(8, "little"))
    digest.update(body)
    return digest.digest()


@final
class Segment:
    """One segment that is being written.

    Args:
        memory: its bytes.
        number: its place among the segments of the journal.
        chain: the chain before its first event.

    Attributes:
        end: where the next record goes.
    """

    def __init__(self, memory: memoryview, number: int, chain: bytes) -> None:
        self.number = number
        self.end = ALIGN
        self._memory = memory
        salt = secrets.token_bytes(16)
        self._seed = _seed_of(salt)
        head = _SEGMENT.pack(_SEGMENT_MAGIC, VERSION, 0, number, salt, chain, 0)[:-8]
        memory[: len(head) + 8] = head + xxhash.xxh3_64(head).intdigest().to_bytes(8, "little")
        memory[len(head) + 8 : ALIGN + ALIGN] = bytes(2 * ALIGN - len(head) - 8)

    @property
    def room(self) -> int:
        """Return the bytes of the largest body that there is room for."""
        return max(0, (len(self._memory) - self.end) // ALIGN * ALIGN - ALIGN)

    def reserve(self, nbytes: int) -> tuple[Place, memoryview]:
        """Return room for a payload, and where it is; its contents are undefined until they are written."""
        self._put_head(EXTENT, nbytes, self.end, 0, NO_CHAIN)
        place = Place(self.number, self.end + ALIGN, nbytes)
        self.end += record_bytes(nbytes)
        return place, self._memory[place.offset : place.offset + nbytes]

    def append(self, body: bytes, number: int, durable: int, chain: bytes) -> None:
        """Write an event; `chain` is the one after it. The head comes last, so that a record with a head is whole."""
        start = self.end + ALIGN
        self._memory[start : start + len(body)] = body
        reached("journal.append.written")
        self._put_head(EVENT, len(body), number, durable, chain)
        self.end += record_bytes(len(body))

    def _put_head(self, kind: int, nbytes: int, number: int, durable: int, chain: bytes) -> None:
        behind = self.end + record_bytes(nbytes)
        if behind + ALIGN <= len(self._memory):
            self._memory[behind : behind + ALIGN] = bytes(ALIGN)  # not even by chance what an earlier use left
        self._memory[self.end : self.end + ALIGN] = _head(kind, nbytes, number, durable, chain, self._seed)


def _head(kind: int, nbytes: int, number: int, durable: int, chain: bytes, seed: int) -> bytes:
    packed = _RECORD.pack(_RECORD_MAGIC, kind, nbytes, number, durable, chain, 0, 0)
    checksum = xxhash.xxh3_64(packed[:48], seed=seed).intdigest()
    return packed[:48] + checksum.to_bytes(8, "little") + packed[56:]


def _seed_of(salt: bytes) -> int:
    return int.from_bytes(salt[:8], "little")


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
        name: what to call it in errors.

    Attributes:
        number, chain: see `Segment`; None if it has no whole head.
    """

    def __init__(self, memory: memoryview, name: str) -> None:
        self.name = name
        self.number: int | None = None
        self.chain = NO_CHAIN
        self._memory = memory
        self._seed = 0
        if len(memory) < 2 * ALIGN:
            return
        packed = bytes(memory[: _SEGMENT.size])
        magic, version, _, number, salt, chain, checksum = _SEGMENT.unpack(packed)
        if magic == _SEGMENT_MAGIC and version == VERSION and xxhash.xxh3_64(packed[:-8]).intdigest() == checksum:
            self.number, self.chain, self._seed = number, chain, _seed_of(salt)

    def events(self, number: int, chain: bytes) -> Iterator[Written]:
        """Go through the events that hold, the first of which is to be `number`, with the chain before it."""
        at = ALIGN
        while (found := self._at(at)) is not None:
            behind = at + record_bytes(found.nbytes)
            if found.kind == EVENT:
                body = bytes(self._memory[at + ALIGN : at + ALIGN + found.nbytes])
                if found.number != number or chained(chain, number, body) != found.chain:
                    return
                chain = found.chain
                yield Written(number, body, chain, self.number or 0, behind)
                number += 1
            elif found.number != at:
                return
            at = behind

    def durable_behind(self, at: int) -> int:
        """Return the highest number up to which an event from `at` on says that all were on the disk, 0 for none."""
        highest = 0
        for place in range(at, len(self._memory) - ALIGN + 1, ALIGN):
            if bytes(self._memory[place : place + 4]) == _RECORD_MAGIC:
                found = self._at(place)
                if found is not None and found.kind == EVENT:
                    highest = max(highest, found.durable)
        return highest

    def extent(self, place: Place) -> memoryview:
        """Return the bytes of a payload.

        Raises:
            DamagedJournal: it reaches beyond the segment.
        """
        if place.offset + place.nbytes > len(self._memory):
            raise damaged(self.name, place.offset, "a payload reaches beyond its end")
        return self._memory[place.offset : place.offset + place.nbytes]

    def _at(self, at: int) -> _Found | None:
        """Return the head of a record, None where there is none that holds."""
        if at + ALIGN > len(self._memory):
            return None
        packed = bytes(self._memory[at : at + ALIGN])
        magic, kind, nbytes, number, durable, chain, checksum, _ = _RECORD.unpack(packed)
        if magic != _RECORD_MAGIC or xxhash.xxh3_64(packed[:48], seed=self._seed).intdigest() != checksum:
            return None
        if at + record_bytes(nbytes) > len(self._memory):
            return None
        return _Found(kind, nbytes, number, durable, chain)


def damaged(name: str, offset: int, what: str) -> DamagedJournal:
    """Return the error for damage that is not the end of a journal."""
    return DamagedJournal(
        f"{name} is damaged at byte {offset}: {what}, and events behind it were written later.",
        remedy="`farstep sessions fsck` says what can be saved.",
        field=name,
    )
