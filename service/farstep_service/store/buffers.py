"""Memory for all segments of a layout: parameters, gradients, or one kind of optimizer state.

Buffers            what the store and the kernels see          offsets, stretches, segments
├── FlatBuffers    memory of ours: one flat tensor per dtype   a server's session
├── HalfPrecisionBuffers  the same, but float32 in 16 bits            gradients as they came
└── BorrowedBuffers (borrowed.py)  tensors of the user         an embedded session
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Self, final

import torch
from torch import Tensor

from farstep.protocol.codecs import Codec
from farstep.protocol.memory import MEMORY_DTYPES, TORCH_DTYPES
from farstep_service.layout import Layout, Segment


class Buffers(ABC):
    """Memory of every segment of a layout.

    Attributes:
        layout: the segments.
        device: where the memory is.
        borders: segments that do not directly follow the one before them in their buffer; no stretch crosses one.
    """

    layout: Layout
    device: torch.device
    borders: frozenset[int] = frozenset()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes allocated by farstep."""

    @abstractmethod
    def stretch(self, first: int, length: int) -> Tensor:
        """Return `length` elements from the beginning of segment `first` on: a flat view in the buffer's real dtype."""

    def span(self, first: int, last: int) -> Tensor | None:
        """Return the flat memory of the segments from `first` to before `last`, None if it is not one piece."""
        if self.borders and any(index in self.borders for index in range(first + 1, last)):
            return None
        length = self.layout.stretch(first, last)
        return None if length is None else self.stretch(first, length)

    def element(self, index: int) -> str:
        """Return the dtype of a segment's memory, which may have fewer bits than the layout's."""
        return self.layout.segments[index].buffer

    def segment(self, index: int) -> Tensor:
        """Return a segment in its parameter's shape and dtype, sharing memory with the buffer."""
        segment = self.layout.segments[index]
        return shaped(self.stretch(index, segment.length), segment)

    def begin(self, segments: Sequence[int]) -> None:  # noqa: B027  # most memory needs no gathering
        """Gather these segments for `stretch`, before a step."""

    def end(self, segments: Sequence[int]) -> None:  # noqa: B027
        """Scatter what a step wrote into these segments to their owner's memory."""


@final
class FlatBuffers(Buffers):
    """One flat tensor per dtype.

    Args:
        layout: the segments.
        device: where to allocate.
        zero: fill with zeros; otherwise the contents are undefined until they are written.
        flat: memory to use, allocated elsewhere with the layout's sizes.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device | str = "cpu",
        *,
        zero: bool = True,
        flat: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layout = layout
        self.device = torch.device(device)
        make = torch.zeros if zero else torch.empty
        self._flat: Mapping[str, Tensor] = flat or {
            buffer: make(size, dtype=MEMORY_DTYPES[buffer], device=self.device) for buffer, size in layout.sizes.items()
        }
        self._views: dict[tuple[int, int], Tensor] = {}
        self._nbytes = -1  # not counted yet

    @property
    def flat(self) -> Mapping[str, Tensor]:
        """Return the flat tensor of each real dtype."""
        return self._flat

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated."""
        if self._nbytes < 0:
            self._nbytes = sum(tensor.nbytes for tensor in self._flat.values())
        return self._nbytes

    def stretch(self, first: int, length: int) -> Tensor:
        """Return a view; see `Buffers`."""
        found = self._views.get((first, length))
        if found is None:
            segment = self.layout.segments[first]
            if len(self._views) > 2 * len(self.layout.segments):
                self._views.clear()
            found = self._flat[segment.buffer][segment.offset : segment.offset + length]
            self._views[first, length] = found
        return found

    def copy_(self, other: Buffers, segments: Sequence[int] | None = None) -> Self:
        """Copy the contents of other buffers of the same layout, for some segments or all."""
        if segments is None and isinstance(other, FlatBuffers):
            for buffer, tensor in self._flat.items():
                tensor.copy_(other._flat[buffer])
            return self
        chosen = range(len(self.layout.segments)) if segments is None else segments
        for first, last in self.layout.spans(chosen):
            source, into = other.span(first, last), self.span(first, last)
            if source is not None and into is not None:
                into.copy_(source)
                continue
            for index in range(first, last):
                self.segment(index).copy_(other.segment(index))
        return self


@final
class HalfPrecisionBuffers(Buffers):
    """Memory in which float32 segments have 16 bits, in the layout of their parameters; so do stretches.

    Args:
        layout: the parameters'.
        codec: their codec, which has an element.
        memory: the memory, in the codec's layout.
    """

    def __init__(self, layout: Layout, codec: Codec, memory: FlatBuffers) -> None:
        self.layout = layout
        self.device = memory.device
        self.borders = layout.apart_on_wire(codec)
        self.codec = codec
        self.memory = memory

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return self.memory.nbytes

    def stretch(self, first: int, length: int) -> Tensor:
        """Return a view, of the memory's own dtype; see `Buffers`."""
        return self.memory.stretch(first, length)

    def element(self, index: int) -> str:
        """Return the dtype of a segment's memory."""
        return self.memory.layout.segments[index].buffer

    def segment(self, index: int) -> Tensor:
        """Return a segment in its parameter's shape and dtype; a copy if it has 16 bits."""
        segment = self.layout.segments[index]
        return shaped(self.stretch(index, segment.length).to(TORCH_DTYPES[segment.buffer]), segment)


def pieces(layout: Layout, segments: Sequence[int], *buffers: Buffers) -> Iterator[tuple[Tensor, ...]]:
    """Go through the memory of some segments in several buffers, in pieces that are one piece in all of them."""
    for first, last in layout.spans(segments):
        spans = [span for each in buffers if (span := each.span(first, last)) is not None]
        if len(spans) == len(buffers):
            yield tuple(spans)
            continue
        for index in range(first, last):
            yield tuple(each.segment(index) for each in buffers)


def encode_(into: FlatBuffers, source: Buffers, codec: Codec, segments: Sequence[int]) -> None:
    """Encode segments with a codec.

    Args:
        into: in the layout of the codec, on the CPU.
        source: in the session's layout.
    """
    if codec.element is not None:
        into.copy_(source, segments)
        return
    for index in segments:
        segment = source.layout.segments[index]
        if codec.applies_to(segment.dtype):
            encoded = into.layout.segments[index]
            its = source.stretch(index, segment.length).to("cpu")
            codec.encode_(its, into.stretch(index, encoded.length))
        else:
            into.segment(index).copy_(source.segment(index))


def decode_(into: FlatBuffers, source: FlatBuffers, codec: Codec, segments: Sequence[int]) -> None:
    """Decode segments into the session's layout: the inverse of `encode_`."""
    for index in segments:
        segment, encoded = into.layout.segments[index], source.layout.segments[index]
        if codec.applies_to(segment.dtype):
            codec.decode_(source.stretch(index, encoded.length), into.stretch(index, segment.length))
        else:
            into.segment(index).copy_(source.segment(index))


def shaped(flat: Tensor, segment: Segment) -> Tensor:
    """Return a segment's flat memory in its parameter's shape and dtype."""
    if segment.is_complex:
        return torch.view_as_complex(flat.view(*segment.shape, 2))
    return flat.view(segment.shape)


def flattened(tensor: Tensor) -> Tensor:
    """Return a contiguous parameter's memory, flat and in its real dtype."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor if tensor.dim() == 1 else tensor.view(-1)
