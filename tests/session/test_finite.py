"""Looking for NaN and Inf: in memory that is there, and in a body while it arrives."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from farstep_service.tensors.finite import PIECE, Watch, all_finite

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def chunks(total: int, size: int) -> Iterator[int]:
    """Return how many bytes are there after each read."""
    yield from range(size, total, size)
    yield total


def watched(spans: list[Tensor], size: int) -> Watch:
    watch = Watch(spans)
    for received in chunks(sum(span.nbytes for span in spans), size):
        watch.arrived(received)
    return watch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_numbers_are_finite_though_their_sum_is_not(dtype: torch.dtype) -> None:
    """The largest number there is, many times."""
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest)
    assert all_finite(torch.empty(0, dtype=dtype))
    for wrong in (math.nan, math.inf, -math.inf):
        largest[777] = wrong
        assert not all_finite(largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_infinities_do_not_hide_each_other(dtype: torch.dtype) -> None:
    """Their sum is no number, and that is seen, too."""
    values = torch.zeros(10, dtype=dtype)
    values[3], values[4] = math.inf, -math.inf
    assert not all_finite(values)


@pytest.mark.parametrize("size", [1, 4099, 100_000, 10_000_000])
def test_all_that_arrives_is_looked_at_once(size: int) -> None:
    """However it is cut, in order, and nothing before it is there."""
    spans = [torch.zeros(5), torch.zeros(PIECE + 3, dtype=torch.bfloat16), torch.zeros(0), torch.zeros(9)]
    spans[2:2] = [torch.zeros(2 * PIECE)] if size > 1000 else []
    received, seen = 0, 0

    def look(span: Tensor) -> bool:
        nonlocal seen
        seen += span.nbytes
        assert seen <= received
        assert span.numel() <= PIECE
        return True

    watch = Watch(spans, look)
    total = sum(span.nbytes for span in spans)
    for received in chunks(total, size):
        assert not watch.over or received == total
        watch.arrived(received)
    assert (watch.over, seen) == (True, total)


@pytest.mark.parametrize("place", [0, 1, PIECE, 2 * PIECE + 10, 3 * PIECE - 1])
def test_a_number_that_is_none_is_found_wherever_it_is(place: int) -> None:
    """The watch is never over then, so that whoever takes the push looks for its name."""
    spans = [torch.zeros(2 * PIECE + 11), torch.zeros(PIECE, dtype=torch.float16)]
    which, at = (0, place) if place < len(spans[0]) else (1, place - len(spans[0]))
    if at < len(spans[which]):
        spans[which][at] = math.inf
        watch = watched(spans, 4099)
        assert not watch.finite
        assert not watch.over


def test_what_has_not_arrived_is_not_known_to_be_finite() -> None:
    """A watch that saw a part is not over."""
    watch = Watch([torch.zeros(100)])
    watch.arrived(399)
    assert not watch.over
    watch.arrived(400)
    assert watch.over
