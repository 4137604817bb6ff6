"""The disk is full, or fails, at one operation: nothing that was acknowledged is lost, and the session goes on."""

from __future__ import annotations

import errno
import random

import pytest

from tests.support.durability.faulty import FaultyStorage
from tests.support.durability.life import FOLDER, Life, position
from tests.support.durability.power import PowerStorage


class Sturdy:
    """Live a session's life on a disk with one fault, as a session does: what failed is tried again.

    After a sync that failed, a snapshot takes the place of the journal's segments.
    """

    def __init__(self, error: int, at: int, seed: int) -> None:
        self.inner = PowerStorage()
        self.faulty = FaultyStorage(self.inner, error, at)
        self.errors: list[OSError] = []
        self.chance = random.Random(seed)
        while True:
            try:
                self.life = Life(self.faulty, "group", self.chance, self.inner.observe, lambda: len(self.inner.log))
                break
            except OSError as exc:
                self.errors.append(exc)

    def restart(self) -> None:
        """Let the process die and another one go on."""
        while True:
            try:
                self.life.recover(self.faulty)
                return
            except OSError as exc:
                self.errors.append(exc)

    def live(self, actions: int) -> None:
        for _ in range(actions):
            try:
                self.life.act()
            except OSError as exc:
                self.errors.append(exc)
                self.inner.observe()
                assert len(self.life.events) == self.life.journal.number  # it happened whole, or not at all
                while (failed := self.life.journal.failed) is not None:
                    with pytest.raises(OSError, match=failed.strerror):
                        self.life.event()
                    with pytest.raises(OSError, match=failed.strerror):
                        self.life.journal.sync(len(self.life.events) + 1)
                    self.life.snapshot()


@pytest.mark.promise(
    "A disk that is full or fails, at any operation, loses nothing that was acknowledged.", area="durability"
)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_one_operation_fails(error: int) -> None:
    """Whichever operation fails, the caller hears of it, can go on, and loses nothing that was acknowledged."""
    hit = set()
    for seed in range(3):
        at = 0
        while True:
            at += 1
            session = Sturdy(error, at, seed)
            session.live(15)
            session.restart()
            session.live(15)
            hit.add(session.faulty.hit)
            assert len(session.errors) == bool(session.faulty.hit)
            assert all(each.errno == error for each in session.errors)
            number, found = session.life.read(session.inner)
            assert (number, found.dropped) == (len(session.life.events), None)
            number, _ = session.life.read(session.inner.crash(session.chance))
            assert number >= session.life.certain()
            if not session.faulty.hit:
                break
        assert at > 40
    assert hit == {"create", "map", "names", "remove", "rename", "size", "sync", "sync_names", "write", ""}


def test_what_a_fault_leaves_behind_goes() -> None:
    """After any fault, the next forget leaves the segments that are needed, spare ones, and nothing else."""
    for at in range(1, 60):
        session = Sturdy(errno.ENOSPC, at, seed=1)
        session.live(30)
        session.faulty.at = 0
        session.life.snapshot()
        names = [name for name in session.inner.names(FOLDER) if not name.startswith("snapshot.json")]
        assert {name.partition(".")[2] for name in names} <= {"journal", "spare"}
        first = position(session.inner)[2]
        assert all(int(name[:8]) >= first for name in names if name.endswith("journal"))
