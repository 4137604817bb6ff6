"""Which groups a worker knows, and knew when it made a write."""

from __future__ import annotations

from farstep.messages import WriteName
from farstep_service.coordinator import KnownGroups

WORKERS = ("w0", "w1", "w2")


def write(worker: str, sequence: int) -> WriteName:
    return WriteName(worker, 1, sequence)


def test_everybody_knows_what_a_session_began_with() -> None:
    """Without a group that was added nobody lags, at any write."""
    known = KnownGroups()
    assert known.lag("w0") is None
    assert known.at(write("w0", 1)) is None
    known.learned(0, write("w0", 1))
    assert known.at(write("w0", 1)) is None


def test_those_who_did_not_add_a_group_lag() -> None:
    """They know what was there before, and who added the first group that they lack."""
    known = KnownGroups()
    known.added(1, write("w0", 5), WORKERS)
    known.added(2, write("w0", 6), WORKERS)
    assert known.lag("w0") is None
    assert known.lag("w1") == (1, "w0")
    known.learned(2, write("w1", 3))
    assert known.lag("w1") == (1, "w0"), "groups are learned in their order"
    known.learned(1, write("w1", 3))
    assert known.lag("w1") == (2, "w0")
    known.learned(2, write("w1", 4))
    assert known.lag("w1") is None
    known.added(3, write("w1", 5), WORKERS)
    assert known.lag("w0") == (3, "w1")
    assert known.lag("w2") == (1, "w0")


def test_what_was_known_at_a_write() -> None:
    """A write from before a group was added or learned is measured by what its worker knew then."""
    known = KnownGroups()
    known.added(1, write("w0", 5), WORKERS)
    known.learned(1, write("w1", 9))
    known.added(2, write("w1", 12), WORKERS)
    known.learned(2, write("w0", 7))
    assert [known.at(write("w0", sequence)) for sequence in (4, 5, 6, 7, 8)] == [1, 2, 2, None, None]
    assert [known.at(write("w1", sequence)) for sequence in (8, 9, 11, 12)] == [1, 2, 2, None]
    assert known.at(write("w2", 100)) == 1


def test_a_worker_that_joins_knows_everything() -> None:
    """A new epoch has no writes from before."""
    known = KnownGroups()
    known.added(1, write("w0", 5), WORKERS)
    for worker in WORKERS:
        known.joined(worker)
        assert known.lag(worker) is None
        assert known.at(WriteName(worker, 2, 1)) is None
    known.added(2, WriteName("w1", 2, 1), WORKERS)
    assert known.lag("w0") == (2, "w1")
