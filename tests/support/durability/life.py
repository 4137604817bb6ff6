"""What a session does with its journal, in small: events with payloads, acknowledgements, snapshots, recoveries.

A snapshot is a file that says where the journal goes on and how many events came before; that is all that a session
leaves behind here. Every event's body is random, and names its payload by place and checksum.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash

from farstep_service.durability.journal import Journal, Sync
from farstep_service.durability.reading import JournalReader, Recovered
from farstep_service.durability.segments import NO_CHAIN, Place, Written
from farstep_service.durability.storage import Storage

FOLDER = "sessions/x"
MANIFEST = f"{FOLDER}/snapshot.json"
SEGMENT_BYTES = 2048
_BODY = struct.Struct("<QQQ16s")
NO_PLACE = (0, 0, 0)
Arriving = tuple[Place, memoryview, bytes]
"""A payload of which half is there: its place, its memory, and what it will be."""


def body_of(place: tuple[int, int, int], payload: bytes | memoryview, rest: bytes) -> bytes:
    return _BODY.pack(*place, xxhash.xxh3_128_digest(payload)) + rest


def holds(reader: JournalReader, event: Written) -> bool:
    """Return whether the payload of an event is what it was."""
    *place, digest = _BODY.unpack_from(event.body)
    payload = reader.payload(Place(*place)) if tuple(place) != NO_PLACE else b""
    return xxhash.xxh3_128_digest(payload) == digest


@dataclass(slots=True)
class Life:
    """One session's use of a journal.

    Attributes:
        storage: its files.
        sync: its level.
        chance: decides what it does.
        observe: called when memory has changed.
        events: the bodies of all events that were appended.
        acknowledged: each acknowledgement: when it came, as `moment` says, and how many events it includes.
        found: what the last recovery found.
    """

    storage: Storage
    sync: Sync
    chance: random.Random
    observe: Callable[[], object] = lambda: None
    moment: Callable[[], int] = lambda: 0
    events: list[bytes] = field(default_factory=list)
    acknowledged: list[tuple[int, int]] = field(default_factory=list)
    found: Recovered = field(default=Recovered(0, NO_CHAIN))
    journal: Journal = field(init=False)
    _arriving: list[Arriving] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        lazily = self.chance.random() < 0.5
        self.journal = Journal(
            self.storage, FOLDER, self.sync, after=self.found, segment_bytes=SEGMENT_BYTES, lazily=lazily
        )
        self.journal.forget(position(self.storage)[2])

    # -- what it does

    def act(self) -> None:
        """Do one thing, chosen by chance."""
        action = self.chance.choices(
            [self.event, self.push, self.arrive, self.acknowledge, self.snapshot], weights=[4, 4, 1, 3, 1]
        )[0]
        action()
        self.observe()

    def event(self) -> None:
        """Append an event without a payload."""
        self.append(body_of(NO_PLACE, b"", self.chance.randbytes(self.chance.randrange(200))))

    def push(self, nbytes: int = -1) -> None:
        """Append an event with a payload, and its result, for which room was asked."""
        payload = self.chance.randbytes(nbytes if nbytes >= 0 else self.chance.choice([1, 64, 100, 700, 700, 3000]))
        place, memory = self.journal.reserve(len(payload))
        memory[:] = payload
        self.append(body_of(place, payload, b""), room=100, payload=place)
        self.append(body_of(NO_PLACE, b"", self.chance.randbytes(100 - _BODY.size)))

    def arrive(self) -> None:
        """Let a payload begin to arrive, or end."""
        if len(self._arriving) < 2:
            self._arriving.append(self.begin_to_arrive(self.chance.randrange(1, 500)))
        else:
            self.end_to_arrive(self._arriving.pop(0))

    def begin_to_arrive(self, nbytes: int) -> Arriving:
        """Reserve room for a payload, and write half of it."""
        payload = self.chance.randbytes(nbytes)
        place, memory = self.journal.reserve(nbytes)
        memory[: nbytes // 2] = payload[: nbytes // 2]
        return place, memory, payload

    def end_to_arrive(self, arriving: Arriving) -> None:
        """Write the other half, copy it all if its segment is gone, and append its event."""
        place, memory, payload = arriving
        half = len(payload) // 2
        memory[half:] = payload[half:]
        assert memory == payload  # nothing else has used its memory
        if place.segment < position(self.storage)[2]:
            place, memory = self.journal.reserve(len(payload))
            memory[:] = payload
        self.append(body_of(place, payload, b"arrived"), payload=place)

    def acknowledge(self) -> None:
        """Sync as the level asks for it, and take note of what a client may now rely on."""
        if self.sync != "os":
            self.journal.sync(len(self.events))
            self.acknowledged.append((self.moment(), len(self.events)))

    def snapshot(self) -> None:
        """Write a snapshot, and let go of what it makes needless, except for payloads that are needed still."""
        segment = self.journal.rotate()
        said = [len(self.events), self.journal.chain.hex(), segment]
        self.storage.write(f"{MANIFEST}.part", [json.dumps(said).encode()])
        self.storage.sync(f"{MANIFEST}.part")
        self.storage.rename(f"{MANIFEST}.part", MANIFEST)
        self.storage.sync_names(FOLDER)
        self.acknowledged.append((self.moment(), len(self.events)))
        self.journal.forget(segment)

    def append(self, body: bytes, room: int = 0, payload: Place | None = None) -> None:
        self.observe()
        number = self.journal.append(body, room, payload=payload)
        self.events.append(body)
        self.observe()
        assert number == len(self.events)

    # -- what is left of it

    def certain(self, cut: int | None = None) -> int:
        """Return how many events were acknowledged at a moment, or until now."""
        return max((number for at, number in self.acknowledged if cut is None or at <= cut), default=0)

    def read(self, storage: Storage) -> tuple[int, Recovered]:
        """Read what a storage holds, check that it is what was written, and return how far it goes."""
        number, chain, segment = position(storage)
        reader = JournalReader(storage, FOLDER, number, chain, segment)
        for event in reader.events(lambda each: holds(reader, each)):
            number += 1
            assert event.number == number
            assert event.body == self.events[number - 1]
            assert holds(reader, event)
        assert number <= len(self.events)
        assert reader.found.number == number
        return number, reader.found

    def recover(self, storage: Storage, cut: int | None = None) -> None:
        """Go on with what a storage holds: a legal prefix with all that was acknowledged."""
        certain = self.certain(cut)
        number, self.found = self.read(storage)
        assert number >= certain
        self.storage, self._arriving, self.acknowledged = storage, [], [(0, certain)]
        del self.events[number:]
        self._begin()


def position(storage: Storage) -> tuple[int, bytes, int]:
    """Return what the snapshot says: how many events it includes, the chain after them, and where they go on."""
    if MANIFEST.rpartition("/")[2] not in storage.names(FOLDER):
        return 0, NO_CHAIN, 1
    number, chain, segment = json.loads(bytes(storage.map(MANIFEST, writable=False)))
    return number, bytes.fromhex(chain), segment
