"""Segments that are copied elsewhere while bodies arrive in them, on a real journal and its recorder."""

from __future__ import annotations

from pathlib import Path

from farstep.protocol.messages import PushHead, WriteName
from farstep_service.coordinator import Push
from farstep_service.durability.archive import SessionArchive
from farstep_service.durability.journal import Journal
from farstep_service.durability.objects import FolderObjects
from farstep_service.durability.reading import JournalReader, name_of, segments_in
from farstep_service.durability.recorder import Recorder, read_events
from farstep_service.durability.segments import NO_CHAIN
from farstep_service.durability.storage import DiskStorage
from farstep_service.tensors.payload import Payload, digest_of

FOLDER = "sessions/x"
NBYTES = 100_000


def test_a_body_that_ends_to_arrive_in_a_closed_segment_is_copied_with_its_event(tmp_path: Path) -> None:
    """The event is in a later segment than its gradients: the archive has both, and what it had too early goes."""
    (tmp_path / "data").mkdir()
    storage, objects = DiskStorage(tmp_path / "data"), FolderObjects(tmp_path / "archive")
    journal = Journal(storage, FOLDER, "os", segment_bytes=256 << 10)
    archive = SessionArchive(objects, storage, FOLDER, "s", lambda _: None, lambda: journal.segment)
    place, memory = journal.reserve(NBYTES)
    arriving = Payload((), b"", (place.segment, place.offset, place.nbytes), packed=False, memory=memory, plain=True)
    recorder = Recorder(journal, lambda _: arriving)
    recorder.late = archive.late.append

    journal.rotate()  # as it is when the segment is full
    archive.bring()
    assert copied(tmp_path, place.segment) == [bytes(storage.map(name_of(FOLDER, place.segment)))]

    memory[:] = bytes(range(250)) * (NBYTES // 250)
    arriving.pieces, arriving.digest = (memory,), digest_of([memory])
    recorder(Push(PushHead(WriteName("w0", 1, 1), "here", 0), ""), 1.0)
    journal.rotate()
    archive.bring()
    assert copied(tmp_path, place.segment) == [bytes(storage.map(name_of(FOLDER, place.segment)))]

    elsewhere = DiskStorage(tmp_path / "elsewhere")
    for number, name in segments_in(storage, FOLDER):
        if number < journal.segment:
            elsewhere.write(name, copied(tmp_path, number))
    reader = JournalReader(elsewhere, FOLDER, 0, NO_CHAIN, 1)
    (happened,) = read_events(reader)
    assert happened.payload is not None
    assert happened.payload.digest == arriving.digest


def copied(tmp_path: Path, number: int) -> list[bytes]:
    """Return all objects that an archive has of a segment."""
    return [each.read_bytes() for each in (tmp_path / "archive" / "x").glob(f"{number:08}.*.journal")]
