"""The file format of a journal: segments of records, which survive being cut off, and in which no damage goes unseen.

    segment    head (64 bytes) mark (64 bytes) record record ... zeros, or what an earlier use of the file left
    record     head (64 bytes) body, padded to a multiple of 64
    event      a body of bytes that a session is replayed from
    extent     room for a payload, which is received straight into it; an event says where it is and what it holds

    head of a segment    farstepJ  version(4)  size/64(4)  number(8)  salt(8)  boot(8)  chain(16)  checksum(8)
    mark                 fsyn  0(4)  durable(8)  checksum(8)  zeros
    head of a record     frec  kind(1)  zeros(3)  nbytes(8)  number(8)  durable(8)  chain(16)  checksum(8)  zeros(8)

All numbers are little-endian. `salt` is drawn anew each time that a file becomes a segment, and seeds the checksums of
its records and its mark: what an earlier use left behind is not read. `chain` of an event is xxh3_128 over the chain of
the event before, its number and its body: an event that was changed, left out, repeated or moved breaks it. `number`
counts the events of a journal from 1. `durable` is the number up to which events were on the disk when this was
written; the mark is written after each sync. `boot` names the time since the machine was started: memory of files that
a process wrote survives its death, but not a loss of power.

A file gets its size before it gets the name of a segment, and its head, too. The magic of a record's head is written
last, and zeros stand where the next one will be. So where reading ends:

    zeros, and no event behind them                  the end
    anything else, and the machine was not           damage: a process that dies leaves nothing of that kind
    started since the segment was begun
    an event or a mark behind it whose `durable`     damage: it was on the disk
    includes the event that is missing
    anything else                                    the end was torn off when the power went
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, final

import xxhash

from farstep.errors import DamagedJournal
from farstep_service.failpoints import reached

ALIGN: Final = 64
"""Bytes of a head, and what bodies are padded to."""
FIRST: Final = 2 * ALIGN
"""Where the first record of a segment is."""
VERSION: Final = 1
EVENT: Final = 1
EXTENT: Final = 2
NO_CHAIN: Final = bytes(16)
"""The chain before the first event of a journal."""
SEGMENT_HEAD: Final = struct.Struct("<8sIIQ8s8s16sQ")
MARK: Final = struct.Struct("<4s4xQQ")
RECORD_HEAD: Final = struct.Struct("<4sB3xQQQ16sQ8x")
SEGMENT_MAGIC: Final = b"farstepJ"
MARK_MAGIC: Final = b"fsyn"
RECORD_MAGIC: Final = b"frec"


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


def boot_name(boot: bytes) -> bytes:
    """Return eight bytes for the time since the machine was started; zeros if that is not known."""
    return xxhash.xxh3_64_digest(boot) if boot else bytes(8)


@final
class Segment:
    """One segment that is written. Its head is there when this returns; its file must not have its name before.

    Args:
        memory: its bytes, a multiple of `ALIGN`.
        number: its place among the segments of the journal.
        chain: the chain before its first event.
        boot: as `boot_name` returns it.

    Attributes:
        number, memory: as above.
        end: where the next record goes.
    """

    def __init__(self, memory: memoryview, number: int, chain: bytes, boot: bytes = bytes(8)) -> None:
        self.number = number
        self.memory = memory
        self.end = FIRST
        salt = secrets.token_bytes(8)
        self._seed = int.from_bytes(salt, "little")
        memory[ALIGN : FIRST + ALIGN] = bytes(FIRST)  # no mark, and no first record
        memory[:ALIGN] = with_checksum(
            SEGMENT_HEAD.pack(SEGMENT_MAGIC, VERSION, len(memory) // ALIGN, number, salt, boot, chain, 0)
        )

    @property
    def room(self) -> int:
        """Return the bytes that are left for records."""
        return len(self.memory) - self.end

    @property
    def is_empty(self) -> bool:
        """Return whether nothing has been written, and no room was reserved."""
        return self.end == FIRST

    def reserve(self, nbytes: int) -> tuple[Place, memoryview]:
        """Return room for a payload, and where it is; its contents are undefined until they are written."""
        self._put_head(EXTENT, nbytes, self.end, 0, NO_CHAIN)
        place = Place(self.number, self.end + ALIGN, nbytes)
        self.end += record_bytes(nbytes)
        return place, self.memory[place.offset : place.offset + nbytes]

    def append(self, body: bytes, number: int, durable: int, chain: bytes) -> None:
        """Write an event; `chain` is the one after it. The head comes last, so that a record with a head is whole."""
        start = self.end + ALIGN
        self.memory[start : start + len(body)] = body
        reached("journal.append.written")
        self._put_head(EVENT, len(body), number, durable, chain)
        self.end += record_bytes(len(body))

    def mark(self, durable: int) -> None:
        """Note that the events up to a number are on the disk."""
        packed = MARK.pack(MARK_MAGIC, durable, 0)[:-8]
        checksum = xxhash.xxh3_64(packed, seed=self._seed).intdigest()
        self.memory[ALIGN : ALIGN + MARK.size] = packed + checksum.to_bytes(8, "little")

    def _put_head(self, kind: int, nbytes: int, number: int, durable: int, chain: bytes) -> None:
        at, behind = self.end, self.end + record_bytes(nbytes)
        if behind + ALIGN <= len(self.memory):
            self.memory[behind : behind + ALIGN] = bytes(ALIGN)  # not even by chance what an earlier use left
        packed = RECORD_HEAD.pack(RECORD_MAGIC, kind, nbytes, number, durable, chain, 0)
        head = packed[:48] + xxhash.xxh3_64(packed[:48], seed=self._seed).intdigest().to_bytes(8, "little")
        # The magic comes last: a process that dies between the two has written nothing.
        self.memory[at + len(RECORD_MAGIC) : at + len(head)] = head[len(RECORD_MAGIC) :]
        self.memory[at : at + len(RECORD_MAGIC)] = RECORD_MAGIC


def with_checksum(packed: bytes) -> bytes:
    """Return the head of a segment with its last eight bytes filled in."""
    return packed[:-8] + xxhash.xxh3_64(packed[:-8]).intdigest().to_bytes(8, "little")


def damaged(name: str, offset: int, what: str) -> DamagedJournal:
    """Return the error for damage that is not the end of a journal."""
    return DamagedJournal(
        f"{name} is damaged at byte {offset}: {what}.",
        remedy="`farstep sessions fsck` says what can be saved.",
        field=name,
        byte=offset,
    )
