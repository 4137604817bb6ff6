"""`Bounded`: nobody runs further ahead of the slowest than the bound, and no gradient is older than it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farstep.protocol.consistency import Bounded
from farstep_service.coordinator.modes.decisions import Abort, Refuse, Step
from tests.coordinator.table import NAMES, Table


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_nobody_runs_further_ahead_than_the_bound(staleness: int) -> None:
    """A worker alone completes staleness + 1 steps, waits, and goes on as soon as the slowest has completed one."""
    table = Table(Bounded(staleness=staleness), ("w0", "w1"))
    for _ in range(staleness + 1):
        assert table.push("w0") == [Step(("w0",))]
    assert table.push("w0") == []
    assert table.push("w1") == [Step(("w1",)), Step(("w0",))]


@pytest.mark.parametrize("how", ["leaves", "lapses"])
def test_the_slowest_is_not_waited_for_any_more_when_it_goes(how: str) -> None:
    """Whoever waited for it goes on at once, be it that it left or that its lease ran out."""
    table = Table(Bounded(staleness=0, lease_s=10), ("w0", "w1"))
    table.push("w0", 1.0)
    table.push("w0", 2.0)
    assert table.deadline == 10.0
    decided = table.leave("w1") if how == "leaves" else table.tick(10.0)
    assert decided == [Step(("w0",))]


def test_a_push_that_waits_too_long_is_given_up_and_told_for_whom_it_waited() -> None:
    """Nothing is applied, nobody else is concerned, and the slow worker keeps its lease."""
    table = Table(Bounded(staleness=0, deadline_s=5, lease_s=100))
    table.push("w0", 0.0)
    table.push("w1", 0.0)
    table.push("w0", 1.0)
    table.push("w1", 2.0)
    assert table.tick(6.0) == [Abort(("w0",), 2, ("w2",))]
    assert table.version == 2
    assert table.push("w2", 6.5) == [Step(("w2",)), Step(("w1",))]


def test_who_joins_begins_with_the_slowest() -> None:
    """A newcomer neither holds the others back at once nor runs ahead of them."""
    table = Table(Bounded(staleness=0), ("w0", "w1"))
    for _ in range(3):
        table.push("w0")
        table.push("w1")
    table.join("w9")
    assert table.push("w0") == [Step(("w0",))]
    assert table.push("w9") == [Step(("w9",))]
    assert table.push("w9") == []
    assert table.push("w1") == [Step(("w1",)), Step(("w9",))]


def test_who_returns_after_its_lease_is_answered_with_what_to_do() -> None:
    """A gradient that misses more than the bound is consumed, not applied; the next one counts, from the slowest on."""
    table = Table(Bounded(staleness=0, lease_s=10), ("w0", "w1"))
    for now in (5.0, 12.0, 13.0, 14.0):
        assert table.push("w0", now) == [Step(("w0",))]
    assert table.push("w1", 15.0, base=0) == [Refuse("w1", "stale")]
    assert [each.reason for each in table.receipts.values()] == ["stale"]
    assert table.push("w1", 15.0) == [Step(("w1",))]


def test_who_returns_when_nobody_else_is_live_waits_for_nobody() -> None:
    """A worker that is ahead of others who are gone takes its steps."""
    table = Table(Bounded(staleness=0, lease_s=10), ("w0", "w1"))
    table.push("w0")
    table.tick(20.0)
    assert table.push("w0", 20.0) == [Step(("w0",))]


def test_who_returns_with_a_gradient_within_the_bound_is_heard() -> None:
    """A pause alone makes no gradient stale."""
    table = Table(Bounded(staleness=0, lease_s=10), ("w0", "w1"))
    table.push("w0", 5.0)
    table.push("w0", 12.0)
    assert table.push("w1", 13.0, base=0) == [Step(("w1",))]


def test_who_has_been_heard_again_is_as_the_others() -> None:
    """Only the first gradient after a pause may be stale: later ones missed what was allowed when it was allowed."""
    table = Table(Bounded(staleness=0, lease_s=10))
    for now in (5.0, 12.0):
        table.push("w0", now)
        table.push("w2", now)
    assert table.push("w1", 13.0, base=0) == [Step(("w1",))]
    assert table.push("w0", 14.0) == [Step(("w0",))]
    assert table.push("w2", 14.0) == [Step(("w2",))]
    for other in ("w0", "w2"):
        table.leave(other)
    assert table.push("w1", 15.0, base=5) == [Step(("w1",))]


@given(
    staleness=st.integers(0, 2),
    workers=st.integers(1, 4),
    order=st.lists(st.integers(0, 3), max_size=200),
)
def test_no_gradient_misses_more_steps_than_the_bound_says(staleness: int, workers: int, order: list[int]) -> None:
    """Workers that compute on what they last received, in any order: staleness stays within `Bounded.bound`."""
    mode = Bounded(staleness=staleness)
    names = NAMES[:workers] if workers < 4 else (*NAMES, "w3")
    table = Table(mode, names)
    bases = dict.fromkeys(names, 0)
    for which in order:
        worker = names[which % len(names)]
        if table.coordinator.waits(worker):
            continue
        before = table.version
        for number, decision in enumerate(table.push(worker, base=bases[worker])):
            assert isinstance(decision, Step)
            (who,) = decision.workers
            assert before + number - bases[who] <= mode.bound(len(names))
            bases[who] = before + number + 1
