"""A difference does not get past the comparison."""

from __future__ import annotations

import pytest
import torch

from farstep.errors import InvalidOption, TensorMismatch
from tests.parity.comparison import Comparison, Refusal, Tolerance, compare

ONE = torch.ones(3)
NEXT = ONE.nextafter(ONE + 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"a": NEXT}, {"a": ONE}, "a differs by 1.19e-07"),
        ({"a": -torch.zeros(1)}, {"a": torch.zeros(1)}, "a differs by 0"),
        ({"a": ONE.double()}, {"a": ONE}, "a is torch.float64 (3,) on cpu, torch's torch.float32 (3,) on cpu"),
        ({"a": torch.ones(3, 1)}, {"a": ONE}, "a is torch.float32 (3, 1) on cpu, torch's torch.float32 (3,) on cpu"),
        ({"a": 1.0}, {"a": 1}, "a is 1.0, torch's 1"),
        ({"a": ONE, "b": ONE}, {"a": ONE}, "only one side has b"),
        ({}, {"a": ONE}, "only one side has a"),
        (Refusal(1, ValueError("no")), {"a": ONE}, "farstep refused at step 1: ValueError: no"),
        ({"a": ONE}, Refusal(1, ValueError("no")), "farstep took what torch refused at step 1: ValueError: no"),
    ],
)
def test_what_differs_is_said(ours, theirs, words):
    """One bit, the sign of a zero, a dtype, a shape, a type, an entry, a refusal: each is named."""
    assert compare(ours, theirs, Tolerance()).wrong == (words,)


def test_what_is_within_the_tolerance_is_measured():
    """A difference that is allowed counts as not identical, with its size; one that is not is named, and so is NaN."""
    found = compare({"a": NEXT, "b": ONE}, {"a": ONE, "b": ONE}, Tolerance(1e-6))
    assert found == Comparison(2, 1, torch.finfo(torch.float32).eps, 1.0)
    assert compare({"a": NEXT}, {"a": ONE}, Tolerance(1e-7)).wrong == ("a differs by 1.19e-07",)
    assert compare({"a": ONE * torch.nan}, {"a": ONE}, Tolerance(1.0)).wrong == ("a differs by inf",)
    assert compare({"a": ONE * torch.nan}, {"a": ONE * torch.nan}, Tolerance()).wrong == ()


def test_refusals_are_alike_in_class_words_and_step():
    """A constructor's exception is torch's; a step's may be ours if it is caught as torch's is and says the same."""
    torchs = RuntimeError("no sparse")
    wrong = {
        step: [
            bool(compare(Refusal(step, ours), Refusal(step, torchs), Tolerance()).wrong)
            for ours in (torchs, TensorMismatch("no sparse"), InvalidOption("no sparse"), RuntimeError("other words"))
        ]
        for step in (0, 1)
    }
    assert wrong == {0: [False, True, True, True], 1: [False, False, True, True]}
    assert compare(Refusal(1, torchs), Refusal(2, torchs), Tolerance()).wrong != ()
