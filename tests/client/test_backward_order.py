"""What is foreseen of a step from the one before."""

from __future__ import annotations

from collections.abc import Sequence

from farstep.overlap import PAUSE_STEPS, STREAMED, BackwardOrder
from farstep.overlap.backward_order import Report


def reports(foresight: BackwardOrder, indices: Sequence[int]) -> list[Report]:
    return [foresight.reported(index) for index in indices]


def learnt(*indices: int) -> BackwardOrder:
    """Return what has seen one step."""
    foresight = BackwardOrder()
    assert reports(foresight, indices) == ["early"] * len(indices)
    foresight.stepped(set(indices), "")
    return foresight


def test_the_first_step_shows_the_order() -> None:
    """Nothing is final in it; in the next one each gradient is, in the order of the first."""
    foresight = learnt(3, 1, 2)
    assert foresight.order == (3, 1, 2)
    assert reports(foresight, [1, 3, 2]) == ["last"] * 3


def test_the_last_report_counts() -> None:
    """Where a parameter was reported several times, it is final at the last one, and its place is that of it."""
    foresight = learnt(0, 1, 2, 1, 0)
    assert foresight.order == (2, 1, 0)
    assert reports(foresight, [0, 1, 2, 1, 0]) == ["early", "early", "last", "last", "last"]
    assert foresight.reported(0) == "late"


def test_unexpected_gradients_are_never_final() -> None:
    """One that the step before had not is not taken for final, however often it comes."""
    foresight = learnt(0, 1)
    assert reports(foresight, [2, 2, 0]) == ["early", "early", "last"]


def test_gradients_that_were_set_by_hand_are_not_foreseen() -> None:
    """After a step with gradients that nobody reported nothing is expected."""
    foresight = BackwardOrder()
    foresight.reported(0)
    foresight.stepped({0, 1}, "")
    assert foresight.order == ()
    assert foresight.reported(0) == "early"


def test_reported_gradients_that_were_not_pushed_are_not_expected() -> None:
    """Expected is what was pushed."""
    foresight = BackwardOrder()
    reports(foresight, [0, 1, 2])
    foresight.stepped({0, 2}, "")
    assert foresight.order == (0, 2)


def test_two_wrong_guesses_in_a_row_are_enough() -> None:
    """Then it pauses, and says so at that moment; one that is followed by a right one is forgotten."""
    foresight = learnt(0)
    outcomes = ["wrong", STREAMED, "wrong", "wrong"]
    paused = []
    for outcome in outcomes:
        assert foresight.reported(0) == "last"
        paused.append(foresight.stepped({0}, outcome))
    assert paused == [False, False, False, True]
    for _ in range(PAUSE_STEPS):
        assert foresight.reported(0) == "early"
        assert not foresight.stepped({0}, "")
    assert foresight.reported(0) == "last"
    assert foresight.stepped({0}, "wrong")  # a single one is enough now
    assert foresight.reported(0) == "early"
