"""Borrowed memory: the user's own tensors, in an embedded session.

    large, contiguous segment      the kernel works on the user's tensor itself
    small segment (< 64k)          gathered with its neighbours into one flat run, and scattered back: two calls for all
    not contiguous, or conjugated  the same, on memory of its own

300 small tensors then cost one kernel call and a few foreach copies. Only the memory for the runs is kept between
steps, so edits of the tensors between steps take effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.memory import TORCH_DTYPES
from farstep_service.layout import Layout
from farstep_service.store.buffers import Buffers, flattened, shaped

SMALL = 2**16
"""Segments with fewer elements are gathered: copying them twice costs less than a kernel call of their own."""


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Which of some segments are gathered, with their views of the staging memory."""

    segments: Sequence[int]
    small: list[int]
    large: list[int]
    views: list[Tensor] = field(default_factory=list)


@final
class BorrowedBuffers(Buffers):
    """Tensors of the user, one per segment.

    Args:
        layout: the segments.
        tensors: one tensor per segment, on one device; None for a missing gradient.
        device: of the tensors.
        small: elements below which a segment is gathered.
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Sequence[Tensor | None] = (),
        *,
        device: torch.device | str = "cpu",
        small: int = SMALL,
    ) -> None:
        self.layout = layout
        self.device = torch.device(device)
        self._shapes = [torch.Size(segment.shape) for segment in layout.segments]
        self._dtypes = [TORCH_DTYPES[segment.dtype] for segment in layout.segments]
        self._places, self._sizes, self.borders = _stage(layout, small)
        self._staged: dict[str, Tensor] = {}
        self._stretches: dict[tuple[int, int], Tensor] = {}
        self._views: list[Tensor | None] = [None] * len(layout.segments)
        self._apart: dict[int, Tensor] = {}
        self._tensors: list[Tensor | None] = [None] * len(layout.segments)
        self._last = _Gathered([], [], [])
        if tensors:
            self.lend(tensors)

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated for runs of small segments, beside the user's own."""
        return sum(tensor.nbytes for tensor in (*self._staged.values(), *self._apart.values()))

    @property
    def present(self) -> list[bool]:
        """Return which segments have a tensor."""
        return [tensor is not None for tensor in self._tensors]

    def lend(self, tensors: Sequence[Tensor | None]) -> None:
        """Replace the tensors, as a backward pass replaces gradients.

        Raises:
            TensorMismatch: the number of tensors, or a shape, dtype, layout or device, is not the segment's.
        """
        if len(tensors) != len(self._shapes):
            raise TensorMismatch(
                f"There are {len(tensors)} tensors for {len(self._shapes)} segments.", field="segments", side="client"
            )
        for index, tensor in enumerate(tensors):
            if tensor is not None and (
                tensor.shape != self._shapes[index]
                or tensor.dtype is not self._dtypes[index]
                or tensor.layout is not torch.strided
            ):
                name = self.layout.segments[index].name
                raise TensorMismatch(
                    f"Tensor {name!r} is {tensor.dtype} {list(tensor.shape)} ({tensor.layout}), "
                    f"the session has {self._dtypes[index]} {list(self._shapes[index])}.",
                    field=name,
                    side="client",
                )
        self._tensors = list(tensors)

    def release(self) -> None:
        """Drop the tensors, and copies of those that are not contiguous, so that their owner can free them."""
        self._tensors = [None] * len(self._shapes)
        self._apart = {}

    def segment(self, index: int) -> Tensor:
        """Return the user's tensor, detached."""
        return self._lent(index).detach()

    def span(self, first: int, last: int) -> Tensor | None:
        """Return the memory of one contiguous tensor; neighbours are never one piece here."""
        tensor = self.segment(first)
        return flattened(tensor) if last == first + 1 and self._is_plain(tensor) else None

    def stretch(self, first: int, length: int) -> Tensor:
        """Return the memory that a kernel works on, between `begin` and `end`."""
        place = self._places[first]
        if place is None:
            apart = self._apart.get(first)
            return flattened(self._lent(first)) if apart is None else apart
        found = self._stretches.get((first, length))
        if found is None:
            if len(self._stretches) > 2 * len(self._places):
                self._stretches.clear()
            found = self._memory(self.layout.segments[first].buffer)[place : place + length]
            self._stretches[first, length] = found
        return found

    def begin(self, segments: Sequence[int]) -> None:
        """Gather the small segments, and those whose memory a kernel cannot traverse."""
        gathered = self._gather(segments)
        self._apart = {
            index: torch.empty(
                self.layout.segments[index].length,
                dtype=TORCH_DTYPES[self.layout.segments[index].buffer],
                device=self.device,
            )
            for index in gathered.large
            if not self._is_plain(self._lent(index))
        }
        views, tensors = self._pairs(gathered)
        _copy(views, tensors)

    def end(self, segments: Sequence[int]) -> None:
        """Scatter them again, and notify autograd of the others, which a kernel has changed."""
        gathered = self._gather(segments)
        views, tensors = self._pairs(gathered)
        _copy(tensors, views)
        direct = [self._lent(index) for index in gathered.large if index not in self._apart]
        if direct:
            torch.autograd.graph.increment_version(direct)
        self._apart = {}

    def _gather(self, segments: Sequence[int]) -> _Gathered:
        """Return which of the segments are gathered; cached, as a step asks twice, and mostly like the step before."""
        if segments is not self._last.segments:
            small = [index for index in segments if self._places[index] is not None]
            large = [index for index in segments if self._places[index] is None]
            self._last = _Gathered(segments, small, large, [self._view(index) for index in small])
        return self._last

    def _pairs(self, gathered: _Gathered) -> tuple[list[Tensor], list[Tensor]]:
        """Return views of the staging memory and the user's tensors, to copy from one to the other."""
        lent = self._tensors
        views, tensors = gathered.views, [each for index in gathered.small if (each := lent[index]) is not None]
        if len(tensors) < len(views):
            tensors = [self._lent(index) for index in gathered.small]  # which says what is missing
        if self._apart:
            views = views + [shaped(flat, self.layout.segments[index]) for index, flat in self._apart.items()]
            tensors += map(self._lent, self._apart)
        return views, tensors

    def _memory(self, buffer: str) -> Tensor:
        if buffer not in self._staged:
            self._staged[buffer] = torch.empty(self._sizes[buffer], dtype=TORCH_DTYPES[buffer], device=self.device)
        return self._staged[buffer]

    def _view(self, index: int) -> Tensor:
        found = self._views[index]
        if found is None:
            segment, place = self.layout.segments[index], self._places[index] or 0
            flat = self._memory(segment.buffer)[place : place + segment.length]
            found = self._views[index] = shaped(flat, segment)
        return found

    def _is_plain(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory holds its plain elements contiguously, on the kernels' device."""
        return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() and tensor.device == self.device

    def _lent(self, index: int) -> Tensor:
        tensor = self._tensors[index]
        if tensor is None:
            raise TensorMismatch(f"There is no tensor for {self.layout.segments[index].name!r}.", side="client")
        return tensor


def _stage(layout: Layout, small: int) -> tuple[list[int | None], dict[str, int], frozenset[int]]:
    """Return the position of each small segment in the staging memory, its size by dtype, and the borders."""
    places: list[int | None] = []
    sizes: dict[str, int] = {}
    borders: set[int] = set()
    large_before: dict[str, bool] = {}
    for index, segment in enumerate(layout.segments):
        large = segment.length >= small
        place = sizes.get(segment.buffer, 0)
        odd = segment.is_complex and place % 2 == 1  # pairs of reals are complex only at even places
        places.append(None if large else place + odd)
        if not large:
            sizes[segment.buffer] = place + odd + segment.length
        if large or odd or large_before.get(segment.buffer, False):
            borders.add(index)
        large_before[segment.buffer] = large
    return places, sizes, frozenset(borders)


def _copy(into: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors, in one call unless torch cannot: it does not write several lazily conjugated ones at once."""
    if not into:
        return
    try:
        torch._foreach_copy_(into, sources)
    except RuntimeError:
        for tensor, source in zip(into, sources, strict=True):
            tensor.copy_(source)
