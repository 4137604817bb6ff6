"""When pushes become a step."""

from __future__ import annotations

from itertools import permutations

import pytest

from farstep.consistency import Async, Sync, from_options, to_options
from farstep.errors import InvalidOption
from farstep_service.aggregation import Abort, Skip, Step, aggregation_for


def test_async_makes_every_push_a_step() -> None:
    """In async mode a push is a step of its own, divided by one, and nothing ever waits."""
    mode = aggregation_for(Async())
    assert mode.offer("w1", 0.0) == Step(("w1",), 1)
    assert mode.offer("w1", 0.0) == Step(("w1",), 1)
    assert mode.places() is None
    assert mode.deadline is None
    assert mode.tick(1e9) is None


@pytest.mark.parametrize("order", list(permutations(["w0", "w1", "w2"])))
def test_sync_reduces_in_the_order_of_names_whatever_the_order_of_arrival(order: tuple[str, ...]) -> None:
    """A sync step is decided by its last push, and lists its workers by name."""
    mode = aggregation_for(Sync(workers=3, deadline_s=10))
    decisions = [mode.offer(worker, float(i)) for i, worker in enumerate(order)]
    assert decisions == [None, None, Step(("w0", "w1", "w2"), 3)]
    assert mode.deadline is None


def test_the_deadline_counts_from_the_first_push_and_aborts_for_all() -> None:
    """When the deadline passes first, one decision names everybody who waited."""
    mode = aggregation_for(Sync(workers=3, deadline_s=10))
    mode.offer("w2", 100.0)
    mode.offer("w0", 105.0)
    assert mode.deadline == 110.0
    assert mode.tick(109.9) is None
    assert mode.tick(110.0) == Abort(("w0", "w2"), 2, 3)
    assert mode.deadline is None
    assert mode.tick(1e9) is None


@pytest.mark.parametrize("order", list(permutations(["w0", "w1", "w2"])))
@pytest.mark.parametrize("skipping", [{"w0"}, {"w1", "w2"}, {"w0", "w1", "w2"}])
def test_a_step_that_one_skips_is_skipped_by_all(order: tuple[str, ...], skipping: set[str]) -> None:
    """Who skips counts as there, whoever comes last, and the next step starts without it."""
    mode = aggregation_for(Sync(workers=3, deadline_s=10))
    decisions = [mode.offer(worker, 0.0, skip=worker in skipping) for worker in order]
    assert decisions == [None, None, Skip(("w0", "w1", "w2"), 3)]
    assert mode.deadline is None
    assert [mode.offer(worker, 1.0) for worker in order] == [None, None, Step(("w0", "w1", "w2"), 3)]


def test_in_async_mode_a_skipped_step_is_the_workers_own() -> None:
    """Nobody waits, so nobody else is asked to skip."""
    mode = aggregation_for(Async())
    assert mode.offer("w1", 0.0, skip=True) == Skip(("w1",), 1)
    assert mode.offer("w0", 0.0) == Step(("w0",), 1)


def test_a_skip_that_was_withdrawn_or_given_up_is_forgotten() -> None:
    """Neither a worker that left nor a deadline that passed makes a later step a skipped one."""
    mode = aggregation_for(Sync(workers=2, deadline_s=10))
    mode.offer("w0", 0.0, skip=True)
    mode.withdraw("w0")
    mode.offer("w1", 0.0)
    assert mode.offer("w0", 0.0) == Step(("w0", "w1"), 2)
    mode.offer("w0", 1.0, skip=True)
    assert mode.tick(11.0) == Abort(("w0",), 1, 2)
    mode.offer("w1", 12.0)
    assert mode.offer("w0", 12.0) == Step(("w0", "w1"), 2)


def test_a_withdrawn_push_does_not_count() -> None:
    """A push that is taken out is waited for again, and the last one out ends the deadline."""
    mode = aggregation_for(Sync(workers=2, deadline_s=10))
    mode.offer("w0", 0.0)
    mode.withdraw("w0")
    assert mode.deadline is None
    assert mode.offer("w1", 1.0) is None
    assert mode.offer("w0", 1.0) == Step(("w0", "w1"), 2)


@pytest.mark.parametrize("mode", [Async(), Sync(workers=4, deadline_s=2.5)])
def test_a_mode_survives_the_wire(mode: Async | Sync) -> None:
    """A mode written as a document is read back equal."""
    assert from_options(to_options(mode)) == mode


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "eventually"},
        {},
        {"mode": "async", "workers": 2},
        {"mode": "sync"},
        {"mode": "sync", "workers": 0},
        {"mode": "sync", "workers": True},
        {"mode": "sync", "workers": 2, "deadline_s": 0},
        {"mode": "sync", "workers": 2, "deadline_s": float("inf")},
    ],
)
def test_a_mode_nobody_knows_is_refused(options: dict[str, object]) -> None:
    """An unknown mode, an unknown option and a value out of range are refused, never ignored."""
    with pytest.raises(InvalidOption):
        from_options(options)
