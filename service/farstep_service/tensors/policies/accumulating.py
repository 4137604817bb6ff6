"""The mean of several rounds in place of each: a sum that waits for the last of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from farstep.protocol.memory import MEMORY_DTYPES
from farstep_service.layout import Layout
from farstep_service.store import FlatBuffers, Gradients, pieces
from farstep_service.tensors.policies.gradients import Workspace

Sparse = Mapping[int, tuple[Tensor, Tensor]]
"""By segment, the indices and values of a gradient."""
Take = Callable[[Sequence[int], torch.dtype], Tensor]


@final
class Accumulated:
    """The sum of the rounds that wait for others before they make a step.

    Attributes:
        count: how many there are.
        workers: whose gradients they are, in the order of the sum.
    """

    def __init__(self) -> None:
        self.clear_()

    def clear_(self) -> None:
        """Begin with no round."""
        self.count = 0
        self.workers: tuple[str, ...] = ()
        self._total: FlatBuffers | None = None
        self._present: set[int] = set()
        self._sparse: dict[int, tuple[Tensor, Tensor]] = {}

    def cloned(self) -> Accumulated:
        """Return the same in memory of its own."""
        copied = Accumulated()
        copied.count, copied.workers, copied._present = self.count, self.workers, set(self._present)
        if self._total is not None:
            copied._total = FlatBuffers(self._total.layout, self._total.device, zero=False).copy_(self._total)
        copied._sparse = {index: (rows.clone(), values.clone()) for index, (rows, values) in self._sparse.items()}
        return copied

    def to_document(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Return what it is as plain values, and its tensors; see `from_document`."""
        total = {} if self._total is None else self._total.flat
        said = {
            "count": self.count,
            "workers": [*self.workers],
            "groups": None if self._total is None else self._total.layout.groups,
            "present": sorted(self._present),
            "sparse": [[i, rows.shape[0], rows.shape[1], str(v.dtype)[6:]] for i, (rows, v) in self._sparse.items()],
        }
        return said, [*total.values(), *(each for pair in self._sparse.values() for each in pair)]

    @classmethod
    def from_document(cls, said: Mapping[str, Any], layout: Layout, take: Take) -> Accumulated:
        """Return what `to_document` described.

        Args:
            layout: the session's.
            take: returns the memory of one tensor after the other, of a shape and dtype.
        """
        own = cls()
        own.count, own.workers, own._present = said["count"], tuple(said["workers"]), set(said["present"])
        if said["groups"] is not None:
            own._total = taken(layout_of(layout, said["groups"]), take)
        for index, dims, count, dtype in said["sparse"]:
            rows = take((dims, count), torch.int64)
            values = take((count, *layout.segments[index].shape[dims:]), getattr(torch, dtype))
            own._sparse[index] = rows, values
        return own

    @property
    def nbytes(self) -> int:
        """Return the memory of the sum."""
        dense = self._total.nbytes if self._total else 0
        if not self._sparse:
            return dense
        return dense + sum(indices.nbytes + values.nbytes for indices, values in self._sparse.values())

    def add_(self, gradients: Gradients, workers: Sequence[str]) -> None:
        """Add a round; its memory becomes the sum's if it is the first one and that memory is ours."""
        dense, theirs = gradients.dense(), gradients.buffers
        sparse = gradients.sparse
        if gradients.borrowed:  # whose owner may write into them, or want them freed, before the sum is complete
            sparse = {index: (rows.clone(), values.clone()) for index, (rows, values) in sparse.items()}
        sparse = _joined(self._sparse, sparse)  # first: where memory is short, the sum stays as it is
        if self._total is None:
            if isinstance(theirs, FlatBuffers) and not gradients.borrowed:
                self._total = theirs
            else:
                self._total = FlatBuffers(theirs.layout, theirs.device, zero=False).copy_(theirs, dense)
        else:
            total = self._total_in(theirs.layout)
            for into, source in pieces(theirs.layout, [i for i in dense if i in self._present], total, theirs):
                into.add_(source)
            for into, source in pieces(theirs.layout, [i for i in dense if i not in self._present], total, theirs):
                into.copy_(source)
        self._present |= set(dense)
        self._sparse = sparse
        self.workers += tuple(workers)
        self.count += 1

    def mean_with(self, last: Gradients, workspace: Workspace) -> Gradients:
        """Return the mean of the rounds that wait and of another one, which completes them; the sum stays as it is."""
        dense, theirs, into = set(last.dense()), last.buffers, workspace.instead_of(last)
        layout, count = theirs.layout, self.count + 1
        total = self._total_in(layout)
        for one, other, out in pieces(layout, sorted(dense & self._present), total, theirs, into):
            torch.add(one, other, out=out)
        for source, out in pieces(layout, sorted(self._present - dense), total, into):
            out.copy_(source)
        if into is not theirs:
            for source, out in pieces(layout, sorted(dense - self._present), theirs, into):
                out.copy_(source)
        present, sparse = sorted(dense | self._present), _joined(self._sparse, last.sparse)
        for index in set(present) & sparse.keys():
            indices, values = sparse.pop(index)
            into.segment(index).add_(_dense(indices, values, layout.segments[index].shape))
        for (out,) in pieces(layout, present, into):
            out.div_(count)
        chosen = {*present, *sparse}
        mask = None if len(chosen) == len(layout.segments) else [i in chosen for i in range(len(layout.segments))]
        return Gradients(into, mask, {index: (rows, values / count) for index, (rows, values) in sparse.items()})

    def _total_in(self, layout: Layout) -> FlatBuffers:
        """Return the sum in a layout, which has more segments at its end than when the sum began if it grew since."""
        assert self._total is not None
        if self._total.layout is not layout:
            before = range(len(self._total.layout.segments))
            self._total = FlatBuffers(layout, self._total.device, zero=False).copy_(self._total, before)
        return self._total


def layout_of(layout: Layout, groups: int) -> Layout:
    """Return a layout as it was with so many param groups."""
    return layout if layout.groups == groups else layout.first(groups)


def taken(layout: Layout, take: Take) -> FlatBuffers:
    """Return buffers whose memory is taken tensor by tensor."""
    return FlatBuffers(
        layout, flat={buffer: take((size,), MEMORY_DTYPES[buffer]) for buffer, size in layout.sizes.items()}
    )


def _joined(ones: Sparse, others: Sparse) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the sums of sparse gradients, uncoalesced: coalescing adds up rows that are named twice."""
    joined = {**others, **ones}
    for index in ones.keys() & others.keys():
        (rows, values), (more, others_values) = ones[index], others[index]
        joined[index] = (torch.cat([rows, more], dim=1), torch.cat([values, others_values]))
    return joined


def _dense(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a sparse gradient as a dense one, where it is."""
    return torch.sparse_coo_tensor(indices, values, shape, device=values.device, check_invariants=False).to_dense()
