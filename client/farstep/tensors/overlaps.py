"""Which tensors share memory, element by element.

Views of one storage need not share any: the columns of a matrix interleave and have no element in common. So tensors
are first compared by their ends, and those within another's ends are marked element by element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Extent:
    """The extent of one tensor in memory.

    Attributes:
        index: of the tensor.
        tensor: the tensor.
        start, stop: its first byte, and the one after its last.
    """

    index: int
    tensor: Tensor
    start: int
    stop: int

    @property
    def dense(self) -> bool:
        """Return whether every byte between its ends is the tensor's."""
        return self.stop - self.start == self.tensor.numel() * self.tensor.element_size()


def overlapping(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the pairs of tensors that share an element, ascending; of several, each but the first is in one pair.

    Args:
        tensors: dense ones; those without memory, such as meta tensors, share nothing.
    """
    extents = [
        _Extent(index, each, each.data_ptr(), _end_of(each))
        for index, each in enumerate(tensors)
        if each.numel() and each.device.type != "meta"
    ]
    extents.sort(key=lambda extent: (str(extent.tensor.device), extent.start))
    return sorted(pair for cluster in _clusters(extents) for pair in _pairs(cluster))


def shares_with_itself(tensor: Tensor) -> bool:
    """Return whether two elements of a dense tensor share memory, as in an expanded one."""
    if not tensor.numel():
        return False
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return stride == 0 or _marks_twice(tensor)
        reach += (size - 1) * stride
    return False


def _marks_twice(tensor: Tensor) -> bool:
    extent = _Extent(0, tensor, 0, _end_of(tensor) - tensor.data_ptr())
    memory = _Map([extent])
    memory.of(extent).fill_(1)
    return int(memory.owners.sum()) < tensor.numel()


def _end_of(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _clusters(extents: Sequence[_Extent]) -> Iterator[list[_Extent]]:
    """Yield groups of extents that overlap, from extents in the order of their starts."""
    cluster: list[_Extent] = []
    stop = 0
    for extent in extents:
        if cluster and (extent.start >= stop or extent.tensor.device != cluster[0].tensor.device):
            if len(cluster) > 1:
                yield cluster
            cluster, stop = [], 0
        cluster.append(extent)
        stop = max(stop, extent.stop)
    if len(cluster) > 1:
        yield cluster


def _pairs(cluster: Sequence[_Extent]) -> Iterator[tuple[int, int]]:
    ordered = sorted(cluster, key=lambda extent: extent.index)
    if all(extent.dense for extent in ordered):
        for place, here in enumerate(ordered):
            before = (each for each in ordered[:place] if each.start < here.stop and here.start < each.stop)
            if (first := next(before, None)) is not None:
                yield first.index, here.index
        return
    memory = _Map(ordered)
    for here in ordered:
        marked = memory.of(here)
        owner = marked[marked > 0]
        if owner.numel():
            yield int(owner.min()) - 1, here.index
        marked[marked == 0] = here.index + 1


class _Map:
    """A map of the memory of some tensors: the owner of each part, 0 at first."""

    def __init__(self, extents: Sequence[_Extent]) -> None:
        self._start = min(each.start for each in extents)
        length = max(each.stop for each in extents) - self._start
        sizes, places = [each.tensor.element_size() for each in extents], [each.start - self._start for each in extents]
        self._unit = math.gcd(*sizes, *places)
        self.owners = torch.zeros(length // self._unit, dtype=torch.int32, device="cpu")

    def of(self, extent: _Extent) -> Tensor:
        """Return the parts of a tensor's elements."""
        tensor, parts = extent.tensor, extent.tensor.element_size() // self._unit
        strides = [stride * parts for stride in tensor.stride()]
        at = (extent.start - self._start) // self._unit
        return self.owners.as_strided([*tensor.shape, parts], [*strides, 1], at)
