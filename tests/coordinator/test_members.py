"""Who counts as a member of a session in any mode, and what becomes of pushes that wait when the mode changes."""

from __future__ import annotations

import pytest

from farstep.errors import IdempotencyMismatch, SessionFull
from farstep.protocol.consistency import Async, Sync
from farstep.protocol.messages import WriteName
from farstep_service.coordinator.modes.decisions import Step
from farstep_service.coordinator.roster import FORGOTTEN_AFTER_S, LAPSED_KEPT
from tests.coordinator.table import NAMES, Table

# -- members ---------------------------------------------------------------------------------------------------------


def test_places_count_live_workers_only() -> None:
    """A full session has no place; the first by name whose lease ran out loses its own to a newcomer."""
    members = Table(Sync(workers=3, lease_s=10)).roster
    with pytest.raises(SessionFull, match="w0, w1, w2"):
        members.make_room("w3", 0.0)
    members.heard("w0", 5.0)
    members.sweep(10.0)
    assert members.make_room("w1", 10.0) == []
    assert members.make_room("w3", 10.0) == ["w1"]


def test_those_who_lapsed_long_ago_are_forgotten() -> None:
    """After an hour, or when very many have lapsed, the first to lapse is as if it had left."""
    members = Table(Async(lease_s=10)).roster
    members.heard("w0", 5.0)
    members.sweep(10.0)
    assert members.forgotten(FORGOTTEN_AFTER_S) == []
    assert members.forgotten(10.0 + FORGOTTEN_AFTER_S) == ["w1", "w2"]
    many = Table(Async(lease_s=10), [f"w{number}" for number in range(LAPSED_KEPT + 2)]).roster
    many.sweep(10.0)
    assert many.forgotten(10.0) == ["w0", "w1"]


def test_a_forgotten_page_never_lets_an_old_epoch_in() -> None:
    """One number is kept of all pages that were: whoever comes back begins above it."""
    table = Table(Async(), ("w0", "w1"))
    for _ in range(3):
        table.leave("w0")
        table.join("w0")
    assert table.roster.epoch("w0") == 4
    table.leave("w0")
    table.leave("w1")
    assert len(table.roster) == 0
    table.join("w1")
    assert table.roster.epoch("w1") == 5


# -- switching -------------------------------------------------------------------------------------------------------


def test_pushes_that_wait_are_offered_to_the_next_mode() -> None:
    """Each gets one outcome: from sync to async all become steps, in the order of names."""
    table = Table(Sync(workers=3))
    table.push("w2")
    table.push("w0")
    assert table.switch(Async(), 1.0) == [Step(("w0",)), Step(("w2",))]
    assert table.deadline is None


def test_a_deadline_begins_anew_in_the_next_mode() -> None:
    """Whoever waits on is not given up because of time that passed in another mode."""
    table = Table(Sync(workers=3, deadline_s=10))
    table.push("w0", 1.0)
    table.switch(Sync(workers=3, deadline_s=5), 9.0)
    assert table.deadline == 14.0


def test_another_push_of_a_worker_that_waits_is_refused() -> None:
    """A worker has one push waiting at most."""
    table = Table(Sync(workers=2), NAMES[:2])
    table.push("w0")
    assert table.coordinator.holds(WriteName("w0", 1, 1), "")
    with pytest.raises(IdempotencyMismatch):
        table.coordinator.holds(WriteName("w0", 1, 1), "other")
