"""The journal of a session: what is appended is read again, from the first event or from a point between."""

from __future__ import annotations

from pathlib import Path

from farstep_service.durability.journal import Journal, JournalReader
from farstep_service.durability.segments import NO_CHAIN
from farstep_service.durability.storage import DiskStorage


def test_events_and_payloads_are_read_again(tmp_path: Path) -> None:
    """Bodies come back in their order with their numbers, and a payload from the place that it was received into."""
    storage = DiskStorage(tmp_path)
    journal = Journal(storage, "sessions/x", "group", segment_bytes=4096)
    places = []
    for number in range(1, 9):
        place, memory = journal.reserve(1000)
        memory[:] = bytes([number]) * 1000
        places.append(place)
        assert journal.append(b"event %d" % number) == number
    journal.sync(8)
    assert journal.durable == 8
    assert journal.segment > 1
    reader = JournalReader(DiskStorage(tmp_path), "sessions/x", 0, NO_CHAIN, 1)
    assert [(each.number, each.body) for each in reader.events()] == [(n, b"event %d" % n) for n in range(1, 9)]
    assert [bytes(reader.payload(place)) for place in places] == [bytes([n]) * 1000 for n in range(1, 9)]
    assert (reader.found.number, reader.found.dropped) == (8, None)
