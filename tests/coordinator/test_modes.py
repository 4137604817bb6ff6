"""When pushes become a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import pytest

from farstep.errors import InvalidOption
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync, from_options, to_options
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator import Heartbeat
from farstep_service.coordinator.modes.decisions import Abort, Refuse, Skip, Step
from tests.coordinator.table import NAMES, Table

# -- async -----------------------------------------------------------------------------------------------------------


def test_async_makes_every_push_a_step() -> None:
    """In async mode a push is a step of its own, divided by one, and nothing ever waits."""
    table = Table(Async())
    for worker in ("w1", "w1", "w0"):
        (step,) = table.push(worker)
        assert step == Step((worker,))
        assert isinstance(step, Step)
        assert step.divisor == 1
    assert table.deadline is None
    assert table.tick(1e9) == []


def test_in_async_mode_a_skipped_step_is_the_workers_own() -> None:
    """Nobody waits, so nobody else is asked to skip."""
    table = Table(Async())
    assert table.push("w1", skip=True) == [Skip(("w1",))]
    assert table.push("w0") == [Step(("w0",))]


# -- sync ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Sync(workers=3, deadline_s=10), Sync(workers="live", deadline_s=10)])
@pytest.mark.parametrize("order", list(permutations(NAMES)))
def test_sync_reduces_in_the_order_of_names_whatever_the_order_of_arrival(
    order: tuple[str, ...], mode: Consistency
) -> None:
    """A sync step is decided by its last push, and lists its workers by name."""
    table = Table(mode)
    decisions = [table.push(worker, float(i)) for i, worker in enumerate(order)]
    assert decisions == [[], [], [Step(NAMES)]]
    assert table.deadline is None


def test_the_deadline_counts_from_the_first_push_and_aborts_for_all() -> None:
    """When the deadline passes first, one decision names everybody who waited and everybody who was missing."""
    table = Table(Sync(workers=3, deadline_s=10, lease_s=1000))
    table.push("w2", 100.0)
    table.push("w0", 105.0)
    assert table.deadline == 110.0
    assert table.tick(109.9) == []
    assert table.tick(110.0) == [Abort(("w0", "w2"), 3, ("w1",))]
    assert table.deadline is None
    assert not table.roster.is_live("w1")
    assert table.tick(500.0) == []


@pytest.mark.parametrize("order", list(permutations(NAMES)))
@pytest.mark.parametrize("skipping", [{"w0"}, {"w1", "w2"}, {"w0", "w1", "w2"}])
def test_a_step_that_one_skips_is_skipped_by_all(order: tuple[str, ...], skipping: set[str]) -> None:
    """Who skips counts as there, whoever comes last, and the next step starts without it."""
    table = Table(Sync(workers=3, deadline_s=10))
    decisions = [table.push(worker, skip=worker in skipping) for worker in order]
    assert decisions == [[], [], [Skip(NAMES)]]
    assert [table.push(worker, 1.0) for worker in order] == [[], [], [Step(NAMES)]]


def test_a_skip_that_was_withdrawn_or_given_up_is_forgotten() -> None:
    """Neither a worker that left nor a deadline that passed makes a later step a skipped one."""
    table = Table(Sync(workers=2, deadline_s=10), NAMES[:2])
    table.push("w0", skip=True)
    table.join("w0")
    table.push("w1")
    assert table.push("w0") == [Step(("w0", "w1"))]
    table.push("w0", skip=True)
    table.tick(10.0)
    table.push("w1", 11.0)
    assert table.push("w0", 11.0) == [Step(("w0", "w1"))]


def test_a_withdrawn_push_is_not_counted() -> None:
    """A worker whose push was taken out has to come again."""
    table = Table(Sync(workers=2), NAMES[:2])
    table.push("w0")
    table.join("w0")
    assert table.deadline is None
    assert table.push("w1", 1.0) == []
    assert table.push("w0", 1.0) == [Step(("w0", "w1"))]


@pytest.mark.parametrize("order", list(permutations(NAMES)))
def test_a_quorum_takes_the_step_with_those_who_are_there(order: tuple[str, ...]) -> None:
    """The K-th push completes the step, whoever it is; the contributors are named in order, and counted as divisor."""
    table = Table(Sync(workers=3, quorum=2))
    assert table.push(order[0]) == []
    (step,) = table.push(order[1])
    assert step == Step(tuple(sorted(order[:2])))
    assert isinstance(step, Step)
    assert step.divisor == 2


def test_who_comes_after_the_quorum_is_late() -> None:
    """Its push is consumed and not applied, its receipt says why and how old it was; its next one takes part."""
    table = Table(Sync(workers=3, quorum=2))
    table.push("w0")
    table.push("w1")
    assert table.push("w2", base=0) == [Refuse("w2", "late")]
    assert table.receipts == {
        WriteName("w2", 1, 1): Receipt(1, 0, staleness=1, applied=False, divisor=1, reason="late")
    }
    assert table.deadline is None
    assert table.push("w2", base=1) == []
    assert table.push("w0", base=1) == [Step(("w0", "w2"))]


def test_a_worker_that_is_part_of_every_step_is_never_late() -> None:
    """A gradient of some steps ago, as of a worker that computes ahead, is late only if one of them was without it."""
    table = Table(Sync(workers=3, quorum=2))
    for step in range(3):
        table.push("w0", base=max(0, step - 1))
        assert table.push("w1", base=max(0, step - 1)) == [Step(("w0", "w1"))]
    table.push("w2")
    assert table.push("w0", base=2) == [Step(("w0", "w2"))]
    assert table.push("w1", base=3) == [Refuse("w1", "late")]
    assert table.push("w2", base=2) == [Refuse("w2", "late")]
    assert table.push("w2", base=3) == []


def test_a_late_push_is_folded_into_the_next_step_where_that_is_asked_for() -> None:
    """It counts as its worker's part in the step being collected, with its staleness in the receipt."""
    table = Table(Sync(workers=3, quorum=2, late="fold"))
    table.push("w0")
    table.push("w1")
    assert table.push("w2", base=0) == []
    assert table.push("w1", base=1) == [Step(("w1", "w2"))]
    assert [each.staleness for each in table.receipts.values()] == [0, 1]


def test_a_quorum_that_is_not_reached_is_given_up_for_all() -> None:
    """Fewer than K at the deadline: one outcome, nothing applied."""
    table = Table(Sync(workers=3, quorum=2, deadline_s=5))
    table.push("w1", 1.0)
    assert table.tick(6.0) == [Abort(("w1",), 2, ("w0", "w2"))]


def test_live_goes_on_without_a_worker_whose_lease_ran_out() -> None:
    """The step is taken with the survivors' gradients as soon as the lease is over, long before the deadline."""
    table = Table(Sync(workers="live", deadline_s=100, lease_s=10))
    table.push("w0", 8.0)
    table.push("w2", 9.0)
    assert table.deadline == 10.0
    assert table.tick(9.5) == []
    assert table.tick(10.0) == [Step(("w0", "w2"))]
    table.push("w0", 11.0)
    assert table.push("w2", 11.0) == [Step(("w0", "w2"))]


def test_a_worker_that_waits_is_live_for_as_long() -> None:
    """A lease shorter than the deadline does not run out under a worker that is waiting for others."""
    table = Table(Sync(workers="live", deadline_s=100, lease_s=10), ("w0", "w1"))
    table.push("w0", 5.0)
    table.happen(Heartbeat("w1"), 9.0)
    assert table.push("w1", 18.0) == [Step(("w0", "w1"))]


def test_live_goes_on_at_the_deadline_without_those_who_are_missing() -> None:
    """Who was missing is not waited for again until it is heard of; its gradient of before is late."""
    table = Table(Sync(workers="live", deadline_s=5, lease_s=100))
    table.push("w0", 1.0)
    table.push("w1", 2.0)
    assert table.tick(6.0) == [Step(("w0", "w1"), without=("w2",))]
    table.push("w0", 7.0)
    assert table.push("w1", 7.0) == [Step(("w0", "w1"))]
    assert table.push("w2", 8.0, base=0) == [Refuse("w2", "late")]
    table.push("w0", 9.0)
    assert table.push("w1", 9.0) == []
    assert table.push("w2", 9.0) == [Step(NAMES)]


def test_live_goes_on_when_the_last_one_awaited_leaves() -> None:
    """Leaving completes a step, and a worker alone waits for nobody."""
    table = Table(Sync(workers="live"), ("w0", "w1"))
    table.push("w0")
    assert table.leave("w1") == [Step(("w0",))]
    assert table.push("w0") == [Step(("w0",))]


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        Async(),
        Async(staleness_scaling="sqrt", lease_s=5),
        Sync(workers=4, deadline_s=2.5),
        Sync(workers=4, quorum=3, late="fold"),
        Sync(workers="live", delay_compensation=0.04),
        Bounded(staleness=0),
    ],
)
def test_a_mode_survives_the_wire(mode: Consistency) -> None:
    """A mode written as a document is read back equal."""
    assert from_options(to_options(mode)) == mode


def test_what_is_as_it_is_by_default_does_not_travel() -> None:
    """A document says what was chosen."""
    assert to_options(Sync(workers=4, quorum=3)) == {"mode": "sync", "workers": 4, "quorum": 3}
    assert repr(Bounded(staleness=2, lease_s=5)) == "Bounded(lease_s=5, staleness=2)"


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [("none", [1.0, 1.0, 1.0]), ("inverse", [1.0, 0.5, 0.25]), ("sqrt", [1.0, math.sqrt(0.5), 0.5])],
)
def test_what_a_stale_gradient_counts(scaling: str, expected: list[float]) -> None:
    """1, 1 / (1 + tau) or 1 / sqrt(1 + tau)."""
    mode = from_options({"mode": "async", "staleness_scaling": scaling})
    assert [mode.factor(tau) for tau in (0, 1, 3)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "eventually"},
        {},
        {"mode": "async", "workers": 2},
        {"mode": "async", "staleness_scaling": "linear"},
        {"mode": "async", "staleness_scaling": "sqrt", "delay_compensation": 0.1},
        {"mode": "async", "delay_compensation": -1.0},
        {"mode": "async", "delay_compensation": float("nan")},
        {"mode": "async", "lease_s": 0},
        {"mode": "sync"},
        {"mode": "sync", "workers": 0},
        {"mode": "sync", "workers": True},
        {"mode": "sync", "workers": "all"},
        {"mode": "sync", "workers": 2, "quorum": 3},
        {"mode": "sync", "workers": 2, "quorum": 0},
        {"mode": "sync", "workers": "live", "quorum": 2},
        {"mode": "sync", "workers": 2, "late": "keep"},
        {"mode": "sync", "workers": 2, "deadline_s": 0},
        {"mode": "sync", "workers": 2, "deadline_s": float("inf")},
        {"mode": "bounded"},
        {"mode": "bounded", "staleness": -1},
        {"mode": "bounded", "staleness": 1.0},
        {"mode": "bounded", "staleness": 1, "deadline_s": -1},
    ],
)
def test_a_mode_nobody_knows_is_refused(options: dict[str, object]) -> None:
    """An unknown mode, an unknown option and a value out of range are refused by who reads them, never ignored."""
    with pytest.raises(InvalidOption) as refused:
        from_options(options)
    assert refused.value.side == "server"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Async(lease_s=0),
        lambda: Async(staleness_scaling="linear"),  # type: ignore[arg-type]
        lambda: Sync(workers=0),
        lambda: Sync(workers=2, quorum=3),
        lambda: Bounded(staleness=-1),
    ],
)
def test_a_mode_that_cannot_be_is_refused_where_it_is_made(make: Callable[[], Consistency]) -> None:
    """A value out of range in one's own program is found by the client, not by a server it never went to."""
    with pytest.raises(InvalidOption, match="found by the client"):
        make()
