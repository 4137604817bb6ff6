"""Which groups a worker knows, and knew when it made a write."""

from __future__ import annotations

from farstep.protocol.messages import WriteName
from farstep_service.coordinator.roster import Roster

WORKERS = ("w0", "w1", "w2")


def roster() -> Roster:
    """Return one of whose workers each has joined once."""
    made = Roster(None, 60.0)
    for worker in WORKERS:
        made.join(worker, 0.0)
    return made


def write(worker: str, sequence: int) -> WriteName:
    return WriteName(worker, 1, sequence)


def test_everybody_knows_what_a_session_began_with() -> None:
    """Without a group that was added nobody lags, at any write."""
    known = roster()
    assert known.lag("w0") is None
    assert known.groups_at(write("w0", 1)) is None
    known.learned(0, write("w0", 1))
    assert known.groups_at(write("w0", 1)) is None


def test_those_who_did_not_add_a_group_lag() -> None:
    """They know what was there before, and who added the first group that they lack."""
    known = roster()
    known.added(1, write("w0", 5))
    known.added(2, write("w0", 6))
    assert known.lag("w0") is None
    assert known.lag("w1") == (1, "w0")
    known.learned(2, write("w1", 3))
    assert known.lag("w1") == (1, "w0"), "groups are learned in their order"
    known.learned(1, write("w1", 3))
    assert known.lag("w1") == (2, "w0")
    known.learned(2, write("w1", 4))
    assert known.lag("w1") is None
    known.added(3, write("w1", 5))
    assert known.lag("w0") == (3, "w1")
    assert known.lag("w2") == (1, "w0")


def test_what_was_known_at_a_write() -> None:
    """A write from before a group was added or learned is measured by what its worker knew then."""
    known = roster()
    known.added(1, write("w0", 5))
    known.learned(1, write("w1", 9))
    known.added(2, write("w1", 12))
    known.learned(2, write("w0", 7))
    assert [known.groups_at(write("w0", sequence)) for sequence in (4, 5, 6, 7, 8)] == [1, 2, 2, None, None]
    assert [known.groups_at(write("w1", sequence)) for sequence in (8, 9, 11, 12)] == [1, 2, 2, None]
    assert known.groups_at(write("w2", 100)) == 1


def test_a_worker_that_joins_knows_everything() -> None:
    """A new epoch has no writes from before."""
    known = roster()
    known.added(1, write("w0", 5))
    for worker in WORKERS:
        known.join(worker, 0.0)
        assert known.lag(worker) is None
        assert known.groups_at(WriteName(worker, 2, 1)) is None
    known.added(2, WriteName("w1", 2, 1))
    assert known.lag("w0") == (2, "w1")
