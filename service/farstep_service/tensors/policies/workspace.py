"""Memory on the way to a step: where results go, and how several buffers are gone through together.

What is clipped is written into memory of ours: the gradients' own if that is ours, else memory that is kept for it,
since a user's gradients are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from torch import Tensor

from farstep_service.layout import Layout
from farstep_service.store import Buffers, FlatBuffers, Gradients


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
