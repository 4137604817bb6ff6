"""An answer is copied as it comes, in whatever steps, and can be undone at any of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farstep.tensors.streaming_copy import StreamingCopy
from tests.support.client.twins import check_equal, drawn

SHAPES = [(3,), (0, 2), (), (5, 4), (7,)]


def parameters_and_arrivals(half: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters, one of them transposed, and what arrives for them."""
    parameters = drawn(0, SHAPES)
    parameters[3] = parameters[3].t().contiguous().t()
    arriving = drawn(1, SHAPES)
    return parameters, [each.to(torch.bfloat16) for each in arriving] if half else arriving


@pytest.mark.parametrize("half", [False, True])
@given(steps=st.lists(st.integers(0, 40), max_size=12))
def test_any_steps_bring_the_whole(half: bool, steps: list[int]) -> None:
    """However the bytes come, the parameters are what arrived, and autograd knows."""
    parameters, arriving = parameters_and_arrivals(half)
    versions = [p._version for p in parameters]
    landing, received = StreamingCopy(parameters, arriving), 0
    total = sum(each.nbytes for each in arriving)
    for each in steps:
        received = min(received + each, total)
        landing.advance(received)
    landing.advance(total)
    landing.finish()
    check_equal(parameters, [each.to(torch.float32) for each in arriving])
    assert all(p._version > version for p, version in zip(parameters, versions, strict=True))


@pytest.mark.parametrize("half", [False, True])
@given(received=st.integers(0, 140))
def test_any_part_can_be_undone(half: bool, received: int) -> None:
    """What was copied is put back, bit by bit, and the parameters look untouched."""
    parameters, arriving = parameters_and_arrivals(half)
    before = [p.clone() for p in parameters]
    versions = [p._version for p in parameters]
    landing = StreamingCopy(parameters, arriving)
    landing.advance(min(received, sum(each.nbytes for each in arriving)))
    landing.undo(before)
    check_equal(parameters, before)
    assert [p._version for p in parameters] == versions


def test_what_has_arrived_is_in_the_parameters_at_once() -> None:
    """Copying does not wait for the end: whole elements are there when they have come."""
    (p,), (arriving,) = [torch.zeros(4)], [torch.ones(4)]
    landing = StreamingCopy([p], [arriving])
    landing.advance(7)
    assert p.tolist() == [1, 0, 0, 0]
    landing.advance(12)
    assert p.tolist() == [1, 1, 1, 0]
