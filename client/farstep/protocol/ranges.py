"""Lists of segments as ranges: `[0, 3, 7, 8]` is segments 0, 1, 2 and 7.

A flat list of half-open ranges, ascending and disjoint: a compact form of the segments with a gradient, since most
neighbours have one or lack it together. Readers check every bound, since an index decides where bytes go.
"""

from __future__ import annotations

from collections.abc import Iterable

from farstep.errors import InvalidRequest, Side


def to_ranges(indices: Iterable[int]) -> list[int]:
    """Return ascending, distinct, non-negative indices as `[start, stop, start, stop, ...]`, neighbours joined.

    Raises:
        ValueError: the indices are not in ascending order, or negative.
    """
    ranges: list[int] = []
    for index in indices:
        stop = ranges[-1] if ranges else 0
        if index < stop:
            raise ValueError(f"Segment indices must ascend from 0; {index} comes after {stop - 1}.")
        if ranges and index == stop:
            ranges[-1] = index + 1
        else:
            ranges += (index, index + 1)
    return ranges


def from_ranges(ranges: object, count: int, *, field: str = "segments", side: Side = "server") -> list[int]:
    """Return the indices in `ranges`.

    Args:
        ranges: the received value of `field`.
        count: the number of segments; indices are below it.

    Raises:
        InvalidRequest: not a list of ascending, non-empty, non-overlapping ranges of ints within `count`.
    """

    def refuse(detail: str) -> InvalidRequest:
        return InvalidRequest(f"`{field}` {detail}", field=field, limit=count, side=side)

    if type(ranges) is not list or len(ranges) % 2 or not set(map(type, ranges)) <= {int}:
        raise refuse("is not a flat list of ints [start, stop, start, stop, ...].")
    indices: list[int] = []
    last = 0
    for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
        if start < last:
            raise refuse(f"has a range that starts at {start}, below {last}; ranges ascend and do not overlap.")
        if stop <= start:
            raise refuse(f"has the empty range [{start}, {stop}).")
        if stop > count:
            raise refuse(f"reaches to {stop}; there are {count} segments.")
        indices.extend(range(start, stop))
        last = stop
    return indices
