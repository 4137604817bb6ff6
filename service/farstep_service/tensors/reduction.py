"""The gradients of one step, of those that workers have pushed: `(g0 + g1 + ...) / divisor`, in the order given.

Each sum is rounded in the gradient's dtype, and a segment that only some have counts as zero for the others, so the
same pushes in the same order give the same bits. One push by itself is taken as it came. `ByContent` is an order for
pushes that have no other one which is the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, final

import torch
from torch import Tensor

from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import Evaluation
from farstep_service.layout import Layout
from farstep_service.store import Buffers, FlatBuffers, Gradients
from farstep_service.tensors.contribution import Contribution, on_device
from farstep_service.tensors.finite import BLOCK

PIECE_BYTES: Final = 1 << 16
"""Bytes that are compared at once to order contributions."""


def reduce_(
    contributions: Sequence[Contribution], divisor: int, device: torch.device, *, half_precision: bool = False
) -> Gradients:
    """Sum contributions in the order given, divide by `divisor`, and return the gradients of one step.

    One by itself is taken as it is, in 16 bits if it came so and the step takes those (`half_precision`). Else the
    sum is built in the first one's memory, if that holds the gradients' own dtypes and is not borrowed. What came in 16
    bits is widened in the copy, or in the addition, which rounds as that of widened numbers does. A segment that only
    some have counts as zero for the others; one that none has is missing from the step. Each sum is
    rounded in the gradient's dtype, as `(g0 + g1 + ...) / divisor` is.
    """
    first, *others = contributions
    layout = first.layout
    alone = not others and divisor == 1
    if alone and half_precision and (as_they_came := first.half_precision()):
        return _single(first, as_they_came, device)
    total = _total_of(first)
    if alone and first.is_whole:
        lent = first.borrowed or first.reused
        return Gradients(on_device(total, device), borrowed=lent, copy=_there(first.copy, device))
    if first.borrowed and (others or divisor != 1):
        total = FlatBuffers(layout, zero=False).copy_(total, first.dense)
    present = set(first.dense)
    sparse = {index: [first.widened(index)] for index in first.sparse}
    for other in others:
        theirs = other.buffers
        if theirs is None:
            continue
        for index in other.sparse:
            sparse.setdefault(index, []).append(other.widened(index))
        for first_index, last in layout.spans(other.dense):
            _add_(total, theirs, present, first_index, last)
        present |= set(other.dense)
    for index in sorted(present & sparse.keys()):
        for pair in sparse.pop(index):
            _densify_(layout, total, index, pair)
    if divisor != 1:
        for first_index, last in layout.spans(sorted(present)):
            span = total.span(first_index, last)
            if span is not None:
                span.div_(divisor)
    joined = {index: _joined(pairs, divisor, device) for index, pairs in sparse.items()}
    chosen = present | joined.keys()
    mask = None if len(chosen) == len(layout.segments) else _mask(layout, chosen)
    borrowed = (first.borrowed or first.reused) and total is first.buffers
    copy = _there(first.copy, device) if alone else None
    return Gradients(on_device(total, device), mask, joined, borrowed=borrowed, copy=copy)


@final
class ByContent:
    """The place of a contribution among others, by the bytes it brings; equal ones have no order, and need none.

    Two of them are compared as far as the first byte that differs, which is not far into any two gradients of training.
    """

    def __init__(self, contribution: Contribution) -> None:
        self._brings = contribution

    def __lt__(self, other: ByContent) -> bool:
        mine, theirs = self._brings, other._brings
        shape, other_shape = _shape_of(mine), _shape_of(theirs)
        if shape != other_shape:
            return shape < other_shape
        for own, others in zip(_pieces(mine), _pieces(theirs), strict=True):
            if own != others:
                return own < others
        return False


def _shape_of(contribution: Contribution) -> tuple[str, list[int], list[tuple[int, tuple[int, ...]]]]:
    """Return what two contributions have in common whose bytes can be compared one by one."""
    sparse = [(index, (*indices.shape, *values.shape)) for index, (indices, values) in contribution.sparse.items()]
    return contribution.codec.name, list(contribution.indices), sparse


def _pieces(contribution: Contribution) -> Iterator[bytes]:
    """Yield the bytes of a contribution piece by piece, dense ones first."""
    buffers = contribution.buffers
    if buffers is not None:
        for first, last in contribution.on_wire.spans(contribution.dense):
            span = buffers.span(first, last)
            if span is not None:
                yield from _cut(span)
    for indices, values in contribution.sparse.values():
        yield from _cut(indices)
        yield from _cut(values)


def _cut(tensor: Tensor) -> Iterator[bytes]:
    memory = tensor_memory(tensor)
    for at in range(0, len(memory), PIECE_BYTES):
        yield memory[at : at + PIECE_BYTES].tobytes()


def _single(only: Contribution, buffers: Buffers, device: torch.device) -> Gradients:
    """Return gradients as they came."""
    mask = None if only.is_whole else _mask(only.layout, {*only.dense, *only.sparse})
    sparse = {index: _joined([only.widened(index)], 1, device) for index in only.sparse}
    borrowed = only.borrowed or only.reused
    return Gradients(on_device(buffers, device), mask, sparse, borrowed=borrowed, copy=_there(only.copy, device))


def _mask(layout: Layout, present: set[int]) -> list[bool]:
    return [index in present for index in range(len(layout.segments))]


def _there(copy: Buffers | None, device: torch.device) -> Buffers | None:
    """Return memory if kernels on a device can write to it."""
    return copy if copy is not None and copy.device == device else None


def mean_evaluation(evaluations: Sequence[Evaluation | None], divisor: int) -> Evaluation | None:
    """Return the evaluation of one step: losses summed in the order given and divided, None where there is none.

    It continues a step if all do: where one worker begins a step, all begin it, since all are at the same parameters.
    """
    made = [each for each in evaluations if each is not None]
    if not made:
        return None
    loss = made[0].loss
    for each in made[1:]:
        loss += each.loss  # not `sum`, which rounds in another way since Python 3.12
    return Evaluation(loss / divisor, all(each.continues for each in made))


def _total_of(first: Contribution) -> FlatBuffers:
    """Return memory that holds the first gradients in their own dtypes."""
    if first.buffers is None:
        return FlatBuffers(first.layout)
    if first.on_wire is first.layout:
        return first.buffers
    return FlatBuffers(first.layout, zero=False).copy_(first.buffers, first.dense)


def _add_(total: FlatBuffers, theirs: FlatBuffers, present: set[int], first: int, last: int) -> None:
    """Add a span of theirs to the total, where the total has one; copy it where it has none."""
    if all(index in present for index in range(first, last)) and theirs.span(first, last) is not None:
        pieces = [(first, last, True)]
    else:
        pieces = [(index, index + 1, index in present) for index in range(first, last)]
    for start, stop, known in pieces:
        into, source = total.span(start, stop), theirs.span(start, stop)
        if into is None or source is None:
            continue
        if not known:
            into.copy_(source)
        elif into.dtype is source.dtype:
            into.add_(source)
        else:  # block by block, since torch widens into temporary memory first
            for block, part in zip(torch.split(into, BLOCK), torch.split(source, BLOCK), strict=True):
                block.add_(part)


def _densify_(layout: Layout, total: FlatBuffers, index: int, pair: tuple[Tensor, Tensor]) -> None:
    segment = layout.segments[index]
    indices, values = pair
    dense = torch.sparse_coo_tensor(indices, values, segment.shape, device=values.device).to_dense()
    span = total.span(index, index + 1)
    if span is not None:
        span.add_(torch.view_as_real(dense).reshape(-1) if dense.is_complex() else dense.reshape(-1))


def _joined(pairs: list[tuple[Tensor, Tensor]], divisor: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return several sparse gradients as one, uncoalesced: coalescing adds up rows that are named twice."""
    indices = torch.cat([indices for indices, _ in pairs], dim=1)
    values = torch.cat([values for _, values in pairs])
    return indices.to(device), (values / divisor if divisor != 1 else values).to(device)
