"""The journal of a session: what is appended is read again, and when a sync is one call."""

from __future__ import annotations

import errno
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from farstep.errors import DamagedJournal
from farstep_service.durability.journal import Journal, Sync
from farstep_service.durability.reading import JournalReader, Recovered
from farstep_service.durability.segments import FIRST, NO_CHAIN, Place, Segment
from farstep_service.durability.storage import DiskStorage, Storage
from tests.support.durability.faulty import FaultyStorage
from tests.support.durability.power import PowerStorage

FOLDER = "sessions/x"
SEGMENT = 4096


def bodies(storage: Storage, number: int = 0, chain: bytes = NO_CHAIN, segment: int = 1) -> list[bytes]:
    return [each.body for each in JournalReader(storage, FOLDER, number, chain, segment).events()]


def found_without(storage: Storage, unwanted: bytes) -> Recovered:
    """Read a journal in which the payload of one event does not hold."""
    reader = JournalReader(storage, FOLDER, 0, NO_CHAIN, 1)
    for _ in reader.events(lambda each: each.body != unwanted):
        pass
    return reader.found


# -- reading what was written


def test_events_and_payloads_are_read_again(tmp_path: Path) -> None:
    """Bodies come back in their order with their numbers, and a payload from the place that it was received into."""
    journal = Journal(DiskStorage(tmp_path), FOLDER, "group", segment_bytes=SEGMENT)
    places = []
    for number in range(1, 9):
        place, memory = journal.reserve(1000)
        memory[:] = bytes([number]) * 1000
        places.append(place)
        assert journal.append(b"event %d" % number) == number
    journal.sync(8)
    assert journal.durable == 8
    assert journal.segment > 1
    reader = JournalReader(DiskStorage(tmp_path), FOLDER, 0, NO_CHAIN, 1)
    assert [(each.number, each.body) for each in reader.events()] == [(n, b"event %d" % n) for n in range(1, 9)]
    assert [bytes(reader.payload(place)) for place in places] == [bytes([n]) * 1000 for n in range(1, 9)]
    assert (reader.found.number, reader.found.chain) == (8, journal.chain)
    assert (reader.found.dropped, reader.found.rebooted) == (None, False)
    assert reader.found.segment == journal.segment + 1


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, SEGMENT - 256, SEGMENT - 192, SEGMENT - 191, SEGMENT, 100_000])
def test_bodies_of_every_size_come_back(tmp_path: Path, nbytes: int) -> None:
    """An event of any size is whole again: at the end of a segment, in one of its own, and between others."""
    journal = Journal(DiskStorage(tmp_path), FOLDER, "os", segment_bytes=SEGMENT)
    written = [b"", b"x" * nbytes, b"y", b"z" * nbytes, b"z" * nbytes, b"end"]
    for body in written:
        journal.append(body)
    assert bodies(DiskStorage(tmp_path)) == written


def test_reading_goes_on_behind_a_snapshot(tmp_path: Path) -> None:
    """Where a rotation was, reading begins with its number and chain, and finds only what came later."""
    storage = DiskStorage(tmp_path)
    journal = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT)
    journal.append(b"before")
    segment = journal.rotate()
    number, chain = journal.number, journal.chain
    journal.append(b"after")
    assert bodies(storage, number, chain, segment) == [b"after"]
    assert bodies(storage, number, chain) == [b"after"]
    journal.forget(segment)
    assert bodies(storage, number, chain, segment) == [b"after"]


def test_a_segment_that_is_gone_is_damage(tmp_path: Path) -> None:
    """A reader that does not find the segment in which its events begin refuses those behind it."""
    storage = DiskStorage(tmp_path)
    journal = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT)
    for body in (b"one", b"two", b"three"):
        journal.append(body)
        journal.rotate()
    storage.remove(f"{FOLDER}/00000002.journal")
    with pytest.raises(DamagedJournal, match="event 2 does not hold"):
        bodies(storage)


def test_what_one_recovery_dropped_stays_dropped() -> None:
    """A journal that goes on before its old end supersedes that end, even if it can be read again later."""
    storage = PowerStorage()
    journal = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT)
    for body in (b"one", b"two", b"three"):
        journal.append(body)
    journal.rotate()
    journal.append(b"four")
    storage.sync(f"{FOLDER}/00000001.journal")
    storage.sync(f"{FOLDER}/00000002.journal")
    storage = storage.crash(random.Random(1))
    found = found_without(storage, b"three")
    assert (found.number, found.lost, found.rebooted) == (2, 4, True)
    assert found.dropped is not None
    assert found.dropped[0] == f"{FOLDER}/00000001.journal"
    after = Journal(storage, FOLDER, "os", after=found, segment_bytes=SEGMENT)
    after.append(b"another")
    assert bodies(storage) == [b"one", b"two", b"another"]


def test_a_payload_that_does_not_hold_is_damage_if_the_machine_went_on(tmp_path: Path) -> None:
    """A process that dies leaves payloads whole, so that a damaged one is no torn end."""
    storage = DiskStorage(tmp_path)
    journal = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT)
    for body in (b"one", b"two"):
        journal.append(body)
    with pytest.raises(DamagedJournal, match="event 2 does not hold"):
        found_without(DiskStorage(tmp_path), b"two")


def test_a_segment_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    """A file that is no segment, or one of a newer release, is named, and nothing is read."""
    storage = DiskStorage(tmp_path)
    journal = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT)
    journal.append(b"one")
    path = tmp_path / FOLDER / "00000002.journal"
    path.write_bytes(b"something else " * 100)
    with pytest.raises(DamagedJournal, match=r"00000002.journal is damaged at byte 0: its head does not hold"):
        bodies(storage)


def test_a_number_that_was_used_is_refused(tmp_path: Path) -> None:
    """A journal does not begin at or before a segment that is there: it would write over what has to be read."""
    storage = DiskStorage(tmp_path)
    journal = Journal(storage, FOLDER, "os", segment=5, segment_bytes=SEGMENT)
    assert journal.segment == 5
    for number in (4, 5):
        with pytest.raises(ValueError, match="Segment 5 is there"):
            Journal(storage, FOLDER, "os", segment=number, segment_bytes=SEGMENT)
    assert Journal(storage, FOLDER, "os", segment_bytes=SEGMENT).segment == 6


def test_a_payload_is_not_taken_for_records() -> None:
    """Bytes that a client makes up, a record of another journal among them, are no event and no sign of damage."""
    storage = PowerStorage()
    journal = Journal(storage, FOLDER, "group", segment_bytes=SEGMENT)
    journal.sync(journal.append(b"one"))
    forged = Segment(memoryview(bytearray(SEGMENT)), 1, NO_CHAIN)
    forged.append(b"x" * 100, number=1000, durable=1000, chain=bytes(16))
    _, memory = journal.reserve(1024)
    memory[:] = forged.memory[FIRST : FIRST + 1024]
    assert bodies(storage) == [b"one"]
    assert bodies(storage.crash(random.Random(1))) == [b"one"]


# -- syncing


def test_a_payload_that_arrives_late_is_synced() -> None:
    """A payload may arrive when its segment was synced long ago; the event that names it is acknowledged whole."""
    storage = PowerStorage()
    journal = Journal(storage, FOLDER, "group", segment_bytes=SEGMENT)
    place, memory = journal.reserve(1000)
    for _ in range(2):
        journal.rotate()
        journal.sync(journal.append(b"meanwhile"))
    memory[:] = b"late" * 250
    journal.sync(journal.append(b"event", payload=place))
    for seed in range(20):
        reader = JournalReader(storage.crash(random.Random(seed)), FOLDER, 0, NO_CHAIN, 1)
        assert len([*reader.events()]) == 3
        assert bytes(reader.payload(place)) == b"late" * 250


def test_an_event_cannot_name_what_is_forgotten() -> None:
    """The place of a payload whose segment is gone is refused, and nothing is written."""
    journal = Journal(PowerStorage(), FOLDER, "os", segment_bytes=SEGMENT)
    place, _ = journal.reserve(1000)
    journal.forget(journal.rotate())
    with pytest.raises(ValueError, match="Segment 1 is forgotten"):
        journal.append(b"event", payload=place)
    assert journal.number == 0


def test_a_journal_that_begins_lazily_makes_no_file_before_it_is_written() -> None:
    """What was found is synced, forgotten and read without a new segment; the first event begins one."""
    storage = PowerStorage()
    Journal(storage, FOLDER, "group", segment_bytes=SEGMENT).append(b"one")
    reader = JournalReader(storage, FOLDER, 0, NO_CHAIN, 1)
    assert len([*reader.events()]) == 1
    journal = Journal(storage, FOLDER, "group", after=reader.found, segment_bytes=SEGMENT, lazily=True)
    assert (journal.first, journal.segment) == (1, 2)
    journal.sync(1)
    assert journal.durable == 1
    assert storage.names(FOLDER) == ["00000001.journal"]
    journal.append(b"two")
    assert storage.names(FOLDER) == ["00000001.journal", "00000002.journal"]
    assert bodies(storage) == [b"one", b"two"]


@dataclass(slots=True)
class GatedStorage(PowerStorage):
    """A storage on which every sync waits for a gate, but those of new files.

    Attributes:
        entered: set when one waits.
        gate: what it waits for.
        calls: how many there were.
    """

    entered: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)
    calls: int = 0

    def sync(self, name: str) -> None:
        if name.endswith(".journal"):
            self.calls += 1
            self.entered.set()
            assert self.gate.wait(60)
        PowerStorage.sync(self, name)


@pytest.mark.parametrize(("sync", "calls"), [("group", 2), ("always", 17)])
def test_those_who_wait_share_a_call(sync: Sync, calls: int) -> None:
    """While a call of `group` runs, all that come later wait for the next one; `always` is a call for each."""
    storage = GatedStorage()
    journal = Journal(storage, FOLDER, sync, segment_bytes=SEGMENT)
    with ThreadPoolExecutor(17) as threads:
        first = threads.submit(journal.sync, journal.append(b"first"))
        assert storage.entered.wait(60)
        others = [threads.submit(journal.sync, journal.append(b"another")) for _ in range(16)]
        storage.gate.set()
        for each in (first, *others):
            each.result()
    assert storage.calls == calls
    assert journal.durable == 17


def test_a_sync_that_failed_is_final() -> None:
    """After it the journal takes nothing, until a snapshot has taken the place of what may not be on the disk."""
    inner = PowerStorage()
    storage = FaultyStorage(inner, errno.EIO, 0)
    journal = Journal(storage, FOLDER, "group", segment_bytes=SEGMENT)
    journal.forget(journal.rotate())
    number = journal.append(b"one")
    storage.at = storage.operations + 1
    for attempt in (journal.sync, journal.sync):
        with pytest.raises(OSError, match="Input/output error") as raised:
            attempt(number)
        assert raised.value is journal.failed
    segment = journal.rotate()
    for again in (lambda: journal.append(b"two"), lambda: journal.reserve(1), lambda: journal.sync(number)):
        with pytest.raises(OSError, match="Input/output error"):
            again()
    journal.forget(segment - 1)
    assert journal.failed is not None
    journal.forget(segment)
    assert journal.failed is None
    for _ in range(5):  # the file that failed is not used again, as its next sync would fail as well
        journal.sync(journal.append(b"two"))
        journal.forget(journal.rotate())
    assert journal.durable == journal.number == 6


def test_appending_goes_on_while_the_disk_is_waited_for() -> None:
    """A sync that takes long does not hold up those who append, reserve or begin a segment."""
    storage = GatedStorage()
    journal = Journal(storage, FOLDER, "group", segment_bytes=SEGMENT)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(journal.sync, journal.append(b"first"))
        assert storage.entered.wait(60)
        journal.append(b"second")
        journal.reserve(SEGMENT)
        journal.rotate()
        journal.append(b"third")
        assert not waiting.done()
        storage.gate.set()
        waiting.result()
        assert journal.durable == 1
    journal.sync(3)
    assert journal.durable == 3


def test_threads_append_and_reserve_at_once(tmp_path: Path) -> None:
    """Each thread's events come back once, in its own order, and its payloads whole, whatever the others do."""
    journal = Journal(DiskStorage(tmp_path), FOLDER, "group", segment_bytes=SEGMENT)

    def write(thread: int) -> None:
        for number in range(50):
            place, memory = journal.reserve(300)
            memory[:] = bytes([thread]) * 300
            journal.sync(journal.append(b"%d %d %d %d %d" % (thread, number, *place)))

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(write, each) for each in range(4)]:
            done.result()
    reader = JournalReader(DiskStorage(tmp_path), FOLDER, 0, NO_CHAIN, 1)
    numbers: dict[int, list[int]] = {each: [] for each in range(4)}
    for event in reader.events():
        thread, number, segment, offset, nbytes = map(int, event.body.split())
        numbers[thread].append(number)
        assert bytes(reader.payload(Place(segment, offset, nbytes))) == bytes([thread]) * 300
    assert numbers == {each: [*range(50)] for each in range(4)}


def test_what_was_found_is_synced_again(tmp_path: Path) -> None:
    """The first sync after a recovery includes what an earlier process left in the kernel's memory."""
    storage = PowerStorage()
    Journal(storage, FOLDER, "group", segment_bytes=SEGMENT).append(b"left in memory")
    reader = JournalReader(storage, FOLDER, 0, NO_CHAIN, 1)
    assert len([*reader.events()]) == 1
    journal = Journal(storage, FOLDER, "group", after=reader.found, segment_bytes=SEGMENT)
    assert (journal.number, journal.durable) == (1, 0)
    journal.sync(journal.append(b"acknowledged"))
    for seed in range(20):
        assert bodies(storage.crash(random.Random(seed))) == [b"left in memory", b"acknowledged"]
