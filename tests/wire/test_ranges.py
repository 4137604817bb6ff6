"""Segments as ranges."""

import pytest

from farstep.errors import InvalidRequest
from farstep.protocol import from_ranges, to_ranges


@pytest.mark.parametrize(
    ("indices", "ranges"),
    [([], []), ([0], [0, 1]), ([0, 1, 2, 7], [0, 3, 7, 8]), ([5, 6, 9, 10], [5, 7, 9, 11]), (range(1000), [0, 1000])],
)
def test_neighbours_are_joined(indices, ranges):
    """Neighbouring indices become one range."""
    assert to_ranges(indices) == ranges
    assert from_ranges(ranges, 1000) == list(indices)


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [3, 4, 4], [-1, 0], [5, 7, 6]])
def test_indices_ascend(indices):
    """Indices out of order, repeated or negative are a mistake of the caller."""
    with pytest.raises(ValueError, match="ascend"):
        to_ranges(indices)


def test_touching_ranges_are_read():
    """Ranges of another writer may touch, as long as they do not overlap."""
    assert from_ranges([0, 2, 2, 4], 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([0, 3, 2, 4], "starts at 2, below 3"),
        ([4, 5, 0, 1], "starts at 0, below 5"),
        ([-1, 2], "starts at -1, below 0"),
        ([3, 3], "empty range"),
        ([3, 2], "empty range"),
        ([0, 11], "reaches to 11; there are 10 segments"),
        ([0, 2**62], "reaches to"),
        ([0, 1, 2], "flat list"),
        ([[0, 1]], "flat list"),
        ([0, True], "flat list"),
        ([0, 1.0], "flat list"),
        (["0", "1"], "flat list"),
        ((0, 1), "flat list"),
        ({"0": 1}, "flat list"),
        ("ab", "flat list"),
        (None, "flat list"),
        (3, "flat list"),
    ],
)
def test_ranges_are_checked(ranges, words):
    """Ranges that overlap, descend, are empty, leave the layout, or are no list of ints are refused by name."""
    with pytest.raises(InvalidRequest, match=words) as caught:
        from_ranges(ranges, 10, field="segments")
    assert caught.value.field == "segments"
    assert caught.value.limit == 10
