"""When a snapshot is due: after steps or seconds, when a journal is large, long, or about to fill the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

import farstep
from farstep_service.durability.journal import Journal
from farstep_service.durability.storage import DiskStorage
from farstep_service.keeping.due import MOST_EVENTS, Due
from farstep_service.keeping.journal_size import ROTATE_BYTES, WINDOWS, rotate_bytes, segment_bytes
from farstep_service.session import Session
from tests.session.writers import begun, new_session, values

FOLDER = "sessions/x"
PLENTY = 1 << 40


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskStorage:
    """Make files below a directory, on a disk with much room."""
    monkeypatch.setattr(DiskStorage, "free_bytes", lambda _: PLENTY)
    return DiskStorage(tmp_path)


@pytest.fixture
def session() -> Session:
    """Make a session with parameters."""
    session = new_session()
    begun(session)
    return session


def journal_on(disk: DiskStorage, session: Session) -> Journal:
    return Journal(disk, FOLDER, "os", segment_bytes=segment_bytes(session.plan))


def test_steps_and_seconds_decide_at_the_level_snapshot(disk: DiskStorage) -> None:
    """A snapshot is due after so many versions or so many seconds, whatever comes first."""
    session = new_session()
    (writer,) = begun(session)
    due = Due(session, farstep.Snapshot(every_steps=2, every_s=60.0), disk, PLENTY)
    due.saved(session.version, 100.0)
    assert due.left_s(110.0, None) == 50.0
    writer.push(values(session, 1))
    assert due.left_s(159.0, None) == 1.0
    assert due.left_s(160.0, None) == 0
    writer.push(values(session, 2))
    assert due.left_s(110.0, None) == 0
    due.saved(session.version, 110.0)
    assert due.left_s(110.0, None) == 60.0


def test_steps_alone_set_no_time(disk: DiskStorage, session: Session) -> None:
    """Without seconds, time does not make a snapshot due."""
    due = Due(session, farstep.Snapshot(every_steps=2, every_s=None), disk, PLENTY)
    due.saved(session.version, 0.0)
    assert due.left_s(1e9, None) is None


def test_a_journal_is_replaced_when_it_is_large(disk: DiskStorage, session: Session) -> None:
    """A snapshot is due when the journal has the bytes that were settled, and not before."""
    due, journal = Due(session, farstep.Journal(), disk, PLENTY), journal_on(disk, session)
    journal.append(b"event")
    assert due.left_s(0.0, journal) is None
    while journal.since_rotation < ROTATE_BYTES:
        journal.reserve(ROTATE_BYTES // 4)
    assert due.left_s(0.0, journal) == 0
    journal.rotate()
    due.saved(session.version, 0.0)
    assert due.left_s(0.0, journal) is None


def test_the_servers_bound_holds_for_all_windows(session: Session) -> None:
    """What a directory holds of a journal stays below `--max-journal-gib`."""
    assert WINDOWS * rotate_bytes(session.plan, 3 << 20) <= 3 << 20


def test_a_journal_is_replaced_after_many_small_events(disk: DiskStorage, session: Session) -> None:
    """Reading events again takes time for each, so that their number counts as well."""
    due, journal = Due(session, farstep.Journal(), disk, PLENTY), journal_on(disk, session)
    for _ in range(MOST_EVENTS - 1):
        journal.append(b"e")
    assert due.left_s(0.0, journal) is None
    journal.append(b"e")
    assert due.left_s(0.0, journal) == 0


def test_what_an_earlier_process_wrote_counts(disk: DiskStorage, session: Session) -> None:
    """A server that is killed again and again writes a snapshot, too."""
    due, journal = Due(session, farstep.Journal(), disk, PLENTY), journal_on(disk, session)
    for _ in range(MOST_EVENTS):
        journal.append(b"e")
    other = Journal(disk, FOLDER, "os", segment_bytes=segment_bytes(session.plan), lazily=True)
    other.number = journal.number
    other.go_on(0, 1)
    assert other.since_rotation >= journal.since_rotation
    assert due.left_s(0.0, other) == 0


def test_a_journal_is_replaced_before_it_fills_the_disk(
    disk: DiskStorage, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot is due while there is still room for it."""
    due, journal = Due(session, farstep.Journal(), disk, PLENTY), journal_on(disk, session)
    monkeypatch.setattr(DiskStorage, "free_bytes", lambda _: segment_bytes(session.plan))
    journal.append(b"e")
    assert due.left_s(0.0, journal) is None  # a snapshot would free nothing
    while journal.since_rotation < segment_bytes(session.plan):
        journal.reserve(1 << 16)
    assert due.left_s(0.0, journal) == 0
    assert due.has_little_room()
