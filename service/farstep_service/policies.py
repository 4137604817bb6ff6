"""A step's gradients clipped and accumulated, and the average of the parameters: arithmetic on whole buffers.

The formulas and their order are in `farstep.policy`. What is clipped is written into memory of ours: the gradients' own
if that is ours, else memory that is kept for it, since a user's gradients are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast, final

import torch
from torch import Tensor

from farstep_service.finite import all_finite
from farstep_service.layout import Layout
from farstep_service.store import Buffers, FlatBuffers, Gradients

Sparse = Mapping[int, tuple[Tensor, Tensor]]
"""By segment, the indices and values of a gradient."""
EPSILON = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm before it divides by it."""


def pieces(layout: Layout, segments: Sequence[int], *buffers: Buffers) -> Iterator[tuple[Tensor, ...]]:
    """Go through the memory of some segments in several buffers, in pieces that are one piece in all of them."""
    for first, last in layout.spans(segments):
        spans = [span for each in buffers if (span := each.span(first, last)) is not None]
        if len(spans) == len(buffers):
            yield tuple(spans)
            continue
        for index in range(first, last):
            yield tuple(each.segment(index) for each in buffers)


@final
class Workspace:
    """Where gradients go that must not be changed where they are: memory that is taken once, when it is needed."""

    def __init__(self) -> None:
        self._buffers: FlatBuffers | None = None

    @property
    def nbytes(self) -> int:
        """Return the memory taken."""
        return self._buffers.nbytes if self._buffers else 0

    def instead_of(self, gradients: Gradients) -> FlatBuffers:
        """Return where results go: the gradients' own memory if it is ours, else some of the same layout."""
        own = gradients.buffers
        if isinstance(own, FlatBuffers) and not gradients.borrowed:
            return own
        if self._buffers is None or self._buffers.layout is not own.layout:
            self._buffers = FlatBuffers(own.layout, own.device, zero=False)
        return self._buffers


def clipped_by_value(gradients: Gradients, value: float, workspace: Workspace) -> Gradients:
    """Return coalesced gradients with no element beyond `value`, as `torch.nn.utils.clip_grad_value_` does."""
    into = workspace.instead_of(gradients)
    for source, target in pieces(into.layout, gradients.dense(), gradients.buffers, into):
        torch.clamp(source, min=-value, max=value, out=target)
    sparse = {index: (rows, its.clamp(min=-value, max=value)) for index, (rows, its) in gradients.sparse.items()}
    return replace(gradients, buffers=into, sparse=sparse, borrowed=False)


def clipped_by_norm(gradients: Gradients, norm: Tensor, largest: float, workspace: Workspace) -> Gradients:
    """Return gradients of a norm whose norm is at most `largest`, as `torch.nn.utils.clip_grads_with_norm_` does.

    Where nothing has to be clipped they are left alone, instead of being multiplied by 1.
    """
    factor = torch.clamp(largest / (norm + EPSILON), max=1.0)
    if factor.item() == 1.0:
        return gradients
    into = workspace.instead_of(gradients)
    for source, target in pieces(into.layout, gradients.dense(), gradients.buffers, into):
        torch.mul(source, factor, out=target)
    sparse = {index: (rows, values * factor) for index, (rows, values) in gradients.sparse.items()}
    return replace(gradients, buffers=into, sparse=sparse, borrowed=False)


def norm_of(gradients: Gradients, norm_type: float) -> Tensor:
    """Return the norm of all gradients as of one vector: the norm of the norms of each, as torch computes it.

    Args:
        gradients: those of a step, coalesced.
        norm_type: the p of the p-norm.
    """
    tensors = [gradients.buffers.segment(index) for index in gradients.dense()]
    tensors += [values for _, values in gradients.sparse.values()]
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(tensors, norm_type) if norm_type != math.inf else map(_largest, tensors)
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(list(norms)), norm_type))


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest absolute value, or NaN: the norm of order infinity, for which torch takes 20 times as long."""
    if tensor.is_complex():
        return cast(Tensor, torch.linalg.vector_norm(tensor, math.inf))
    return torch.stack(tensor.aminmax()).abs().amax()


def coalesced(gradients: Gradients) -> Gradients:
    """Return gradients of whose sparse ones no row is named twice."""
    found = {}
    for index, (indices, values) in gradients.sparse.items():
        shape = gradients.buffers.layout.segments[index].shape
        whole = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False).coalesce()
        found[index] = (whole.indices(), whole.values())
    return replace(gradients, sparse=found) if found else gradients


def first_nonfinite_in(gradients: Gradients) -> int | None:
    """Return the first segment whose gradient holds NaN or Inf, None if all are finite.

    Several finite gradients may have a sum that is not.
    """
    dense = gradients.dense()
    for (span,) in pieces(gradients.buffers.layout, dense, gradients.buffers):
        if not all_finite(_flat(span)):
            break
    else:
        dense = []
    for index in dense:
        if not all_finite(_flat(gradients.buffers.segment(index))):
            return index
    for index, (_, values) in gradients.sparse.items():
        if not all_finite(_flat(values)):
            return index
    return None


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


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

    @property
    def nbytes(self) -> int:
        """Return the memory of the sum."""
        dense = self._total.nbytes if self._total else 0
        return dense + sum(indices.nbytes + values.nbytes for indices, values in self._sparse.values())

    def add_(self, gradients: Gradients, workers: Sequence[str]) -> None:
        """Add a round; its memory becomes the sum's if it is the first one and that memory is ours."""
        dense, theirs = gradients.dense(), gradients.buffers
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
        self._sparse = _joined(self._sparse, gradients.sparse)
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
            shape = layout.segments[index].shape
            into.segment(index).add_(torch.sparse_coo_tensor(indices, values, shape, check_invariants=False).to_dense())
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


def _joined(ones: Sparse, others: Sparse) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the sums of sparse gradients, uncoalesced: rows named twice are added up by whoever coalesces."""
    joined = {**others, **ones}
    for index in ones.keys() & others.keys():
        (rows, values), (more, others_values) = ones[index], others[index]
        joined[index] = (torch.cat([rows, more], dim=1), torch.cat([values, others_values]))
    return joined


@final
class Average:
    """The exponential moving average of a session's parameters.

    It begins with the first step, after which it is the parameters themselves, as `AveragedModel`'s first update is.

    Args:
        decay: how much of the average stays at each step.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._buffers: FlatBuffers | None = None

    @property
    def buffers(self) -> FlatBuffers | None:
        """Return the average, None before the first step."""
        return self._buffers

    @property
    def nbytes(self) -> int:
        """Return its memory."""
        return self._buffers.nbytes if self._buffers else 0

    def adopt(self, buffers: FlatBuffers, device: torch.device) -> None:
        """Go on with an average from elsewhere, in its own memory if that is on the device."""
        moved = FlatBuffers(buffers.layout, device, zero=False).copy_(buffers) if buffers.device != device else buffers
        self._buffers = moved

    def write_(self, segments: Sequence[int], values: Buffers, parameters: Buffers) -> None:
        """Replace some segments of it; one that has not begun begins with the parameters for the others."""
        if self._buffers is None:
            self._buffers = FlatBuffers(parameters.layout, parameters.device, zero=False).copy_(parameters)
        self._buffers.copy_(values, segments)

    def update_(self, parameters: Buffers) -> None:
        """Take the parameters after a step into it."""
        layout = parameters.layout
        if self._buffers is None:
            self._buffers = FlatBuffers(layout, parameters.device, zero=False).copy_(parameters)
            return
        every = range(len(layout.segments))
        # Tensor by tensor, as torch does it: where a tensor ends decides how its last elements are rounded.
        averages, now = [self._buffers.segment(i) for i in every], [parameters.segment(i) for i in every]
        torch._foreach_lerp_(averages, now, 1 - self._decay)

    def grow(self, parameters: Buffers) -> None:
        """Take segments in that a session has grown by; their average begins with what they are."""
        if self._buffers is not None:
            before = len(self._buffers.layout.segments)
            grown = FlatBuffers(parameters.layout, parameters.device, zero=False).copy_(self._buffers, range(before))
            self._buffers = grown.copy_(parameters, range(before, len(parameters.layout.segments)))
