"""Segments are used again, but never while anything refers to what they hold."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from farstep_service.durability.journal import Journal
from farstep_service.durability.reading import JournalReader
from farstep_service.durability.segments import NO_CHAIN
from farstep_service.durability.storage import DiskStorage
from tests.support.durability.faulty import FaultyStorage
from tests.support.durability.power import PowerStorage

FOLDER = "sessions/x"
SEGMENT = 4096


def inodes(root: Path) -> set[int]:
    return {path.stat().st_ino for path in (root / FOLDER).iterdir()}


def suffixes(root: Path) -> list[str]:
    return sorted(path.suffix for path in (root / FOLDER).iterdir())


def push(journal: Journal, nbytes: int = 1000) -> None:
    _, memory = journal.reserve(nbytes)
    memory[:] = b"p" * nbytes
    journal.append(b"event", room=100)
    journal.append(b"result")


@pytest.mark.parametrize("pushes", [5, 50])
def test_a_steady_state_makes_no_files(tmp_path: Path, pushes: int) -> None:
    """Pushes and rotations that go on and on use the same few files."""
    journal = Journal(DiskStorage(tmp_path), FOLDER, "os", segment_bytes=SEGMENT)
    seen: list[set[int]] = []
    for _ in range(20):
        for _ in range(pushes):
            push(journal)
        journal.forget(journal.rotate())
        seen.append(inodes(tmp_path))
    assert set.union(*seen) == seen[0]
    assert len(seen[0]) > pushes // 5
    assert journal.number == 40 * pushes


def test_spares_are_bounded(tmp_path: Path) -> None:
    """No more bytes wait to be used again than the journal was told, in its own files or those that it finds."""
    storage = DiskStorage(tmp_path)
    journal = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT, spare_bytes=2 * SEGMENT)
    for _ in range(30):
        push(journal)
    assert journal.nbytes == SEGMENT * len(inodes(tmp_path)) > 5 * SEGMENT
    journal.forget(journal.segment)
    assert suffixes(tmp_path) == [".journal", ".spare", ".spare"]
    assert (journal.nbytes, journal.spare_nbytes) == (SEGMENT, 2 * SEGMENT)
    again = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT, spare_bytes=SEGMENT)
    assert suffixes(tmp_path) == [".journal", ".journal"]  # one spare has become the new segment, and one was too many
    assert again.spare_nbytes == 0
    Journal(storage, FOLDER, "os", segment_bytes=2 * SEGMENT)
    assert again.nbytes == 2 * SEGMENT


def test_large_segments_are_removed(tmp_path: Path) -> None:
    """A segment that was made for one large payload does not wait to be used again."""
    journal = Journal(DiskStorage(tmp_path), FOLDER, "os", segment_bytes=SEGMENT)
    push(journal, 10 * SEGMENT)
    assert journal.nbytes > 11 * SEGMENT
    journal.forget(journal.rotate())
    assert suffixes(tmp_path) == [".journal", ".spare"]
    assert (journal.nbytes, journal.spare_nbytes) == (SEGMENT, SEGMENT)


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(lambda memory: memory, id="memory"),
        pytest.param(lambda memory: memory[10:20], id="slice"),
        pytest.param(lambda memory: torch.frombuffer(memory, dtype=torch.float32), id="tensor"),
        pytest.param(lambda memory: torch.frombuffer(memory, dtype=torch.float32)[3:].view(-1, 1), id="view"),
    ],
)
def test_memory_that_is_referred_to_is_not_used_again(
    tmp_path: Path, reference: Callable[[memoryview], memoryview | torch.Tensor]
) -> None:
    """A payload stays what it is while a step reads it, also when its segment is forgotten and others are written."""
    journal = Journal(DiskStorage(tmp_path), FOLDER, "os", segment_bytes=SEGMENT)
    place, memory = journal.reserve(400)
    memory[:] = b"abcd" * 100
    held = reference(memory)
    before = bytes(held) if isinstance(held, memoryview) else held.clone()
    del memory
    old = inodes(tmp_path)
    journal.forget(journal.rotate())
    assert place.segment < journal.first
    for _ in range(30):
        push(journal)
        journal.forget(journal.rotate())
    assert old.isdisjoint(inodes(tmp_path))
    after = bytes(held) if isinstance(held, memoryview) else held
    assert before == after if isinstance(before, bytes) else torch.equal(before, torch.as_tensor(after))


def test_a_body_may_arrive_while_its_segment_goes(tmp_path: Path) -> None:
    """A place in a segment that is forgotten meanwhile can still be written, and is seen to be too old to be named."""
    journal = Journal(DiskStorage(tmp_path), FOLDER, "os", segment_bytes=SEGMENT)
    place, memory = journal.reserve(500)
    memory[:250] = b"a" * 250
    journal.forget(journal.rotate())
    memory[250:] = b"b" * 250
    assert place.segment < journal.first == journal.segment
    copy, room = journal.reserve(500)
    room[:] = memory
    journal.append(b"event")
    reader = JournalReader(DiskStorage(tmp_path), FOLDER, 0, NO_CHAIN, journal.first)
    assert len([*reader.events()]) == 1
    assert bytes(reader.payload(copy)) == b"a" * 250 + b"b" * 250


@pytest.mark.parametrize("before", range(0, SEGMENT, 64))
def test_room_that_was_asked_for_stays(before: int) -> None:
    """On a full disk a result finds the room that its event asked for, whatever is reserved between the two."""
    inner = PowerStorage()
    storage = FaultyStorage(inner, errno.ENOSPC, 0)
    journal = Journal(storage, FOLDER, "os", segment_bytes=SEGMENT)
    journal.append(b"x" * before)
    journal.append(b"event", room=500)
    storage.full = True
    for nbytes in (2000, 900, 300, 100, 10, 0):
        try:
            while True:
                journal.reserve(nbytes)
        except OSError as exc:
            assert exc.errno == errno.ENOSPC  # noqa: PT017
    segment, number = journal.segment, journal.number
    assert journal.append(b"r" * 500) == number + 1
    assert journal.segment == segment
