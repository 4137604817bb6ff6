"""What a push brings: the gradients of one worker.

Memory is taken when the header has been checked and the body's length fits, never because a header claims something.
Dense gradients lie in flat buffers like the parameters; sparse ones are indices and values by segment.

What came as bytes of a codec is decoded when all of it is there and the push is known to be no repetition; what came in
16 bits stays so, since kernels take it.

Gradients in shared memory are borrowed: their worker can write to them at any time. What is looked at and what a step
then takes have to be the same bytes, so `secure_` copies them first, and only the copy is looked at.

In a journal's memory they stay as they came: `payload` says where they are, and a step that changes them copies them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farstep.errors import InvalidRequest, TensorMismatch
from farstep.protocol import DTYPES, from_ranges
from farstep.protocol.codecs import codec_named
from farstep.protocol.dtypes import BYTES
from farstep.protocol.hyper import Hyper
from farstep.protocol.memory import MEMORY_DTYPES, TORCH_DTYPES, tensor_memory
from farstep.protocol.messages import Sparse
from farstep_service.layout import Layout, Segment
from farstep_service.optimizers.rule import AnyMethod
from farstep_service.store import Buffers, FlatBuffers, HalfPrecisionBuffers, decode_
from farstep_service.tensors.finite import Watch, copy_finite_
from farstep_service.tensors.payload import Payload, Place, Reserve, Room, fill, padded

WATCH_FROM_BYTES = 1 << 20
"""Bytes of gradients from which it pays to look at them while they arrive."""


@dataclass(frozen=True, slots=True)
class Copied:
    """Segments of a version that a step has written to other memory as well."""

    version: int
    segments: frozenset[int]


class Contribution:
    """The gradients of one push.

    Args:
        layout: the session's.
        ranges: which segments have a gradient; None for all.
        sparse: which of them are sparse.
        rule, groups: say where a sparse gradient is accepted; no groups if that was asked before.
        codec: the name of the codec in which they come; None for as they are.
        order: the segments in the order in which they come; None for ascending.

    Attributes:
        codec: as above.
        buffers: memory of the dense gradients; None before there is any, and while they are bytes (`decode_`).
        on_wire: the layout of `buffers`: in 16 bits, if they came so.
        sparse: indices and values of the sparse gradients, by segment.
        check_s: the seconds that looking for NaN and Inf in it took, when all of it was there.
        watch: looks for them while it arrives; None where none are looked for.
        borrowed: the memory is the worker's, which may write to it at any time; it is only read here.
        reused: the memory is for the worker's next push as well, so nothing may keep it.
        copy: where the parameters of its step may be written as well, for the answer; None without such memory.
        copied: what the step that it became has written there.
        payload: its bytes as they came, and where they are in a journal; None where no journal wants them.
        journaled: they go to a journal, so they are secured even if no step looks at them.

    Raises:
        InvalidRequest: segment ranges that are not in order, a sparse row that names a segment without a gradient, or
            an order of other segments.
        TensorMismatch: a sparse gradient of a shape the segment does not have, or one that the optimizer does not take.
    """

    def __init__(
        self,
        layout: Layout,
        ranges: list[int] | None,
        sparse: Sequence[Sparse],
        rule: AnyMethod,
        groups: Sequence[Hyper] | None,
        codec: str | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        count = len(layout.segments)
        self.layout = layout
        self.codec = codec_named(codec)
        self._travelling = layout.on_wire(self.codec)
        self.on_wire = layout if self.codec.element is None else self._travelling
        self.indices: Sequence[int] = range(count) if ranges is None else from_ranges(ranges, count)
        if order is not None and sorted(order) != list(self.indices):
            raise InvalidRequest("Header key 'order' must name each segment with a gradient once.", field="order")
        self._order = self.indices if order is None else order
        self._announced = {each.segment: each for each in sparse}
        if len(self._announced) != len(sparse) or not self._announced.keys() <= set(self.indices):
            raise InvalidRequest(
                "Header key 'sparse' names a segment twice, or one without a gradient.", field="sparse"
            )
        if groups is not None:
            rule.check_gradients(layout, groups, self.dense, self._announced)
        for each in sparse:
            _check_shape(layout.segments[each.segment], each)
        self.nbytes = self._travelling.nbytes if self.is_whole else sum(self._size(index) for index in self.indices)
        self.check_s = 0.0
        self.watch: Watch | None = None
        self.buffers: FlatBuffers | None = None
        self._encoded: FlatBuffers | None = None
        self.borrowed = False
        self.reused = False
        self._own: FlatBuffers | None = None
        self._finite = False
        self.copy: Buffers | None = None
        self.copied: Copied | None = None
        self.payload: Payload | None = None
        self.journaled = False
        self._place: Place | None = None
        self._room = Room()
        self.sparse: dict[int, tuple[Tensor, Tensor]] = {}

    def decode_(self) -> None:
        """Decode what came as bytes of a codec, and let go of them; what came as numbers is ready as it is."""
        encoded = self._encoded
        if encoded is None:
            return
        buffers = FlatBuffers(self.layout, zero=False)
        decode_(buffers, encoded, self.codec, self.dense)
        for index, (indices, values) in self.sparse.items():
            segment = self.layout.segments[index]
            if self.codec.applies_to(segment.dtype):
                shape = (indices.shape[1], *segment.shape[indices.shape[0] :])
                decoded = torch.empty(math.prod(shape), dtype=TORCH_DTYPES[segment.buffer], device="cpu")
                self.codec.decode_(values, decoded)
                self.sparse[index] = indices, decoded.view(shape)
        self.buffers, self._encoded, self.borrowed = buffers, None, False

    def cloned(self) -> Contribution:
        """Return the same gradients in memory of their own."""
        twin = copy.copy(self)
        twin.watch = twin.copy = twin.copied = twin._own = twin.payload = twin._place = None
        twin.borrowed = twin.reused = twin.journaled = False
        if self.buffers is not None:
            twin.buffers = FlatBuffers(self.buffers.layout, self.buffers.device, zero=False).copy_(self.buffers)
        twin.sparse = {index: (rows.clone(), values.clone()) for index, (rows, values) in self.sparse.items()}
        return twin

    def _size(self, index: int) -> int:
        announced = self._announced.get(index)
        if announced is None:
            return self._travelling.segments[index].nbytes
        return 8 * announced.dims * announced.nnz + self._values_bytes(index, announced)

    def _values_bytes(self, index: int, announced: Sparse) -> int:
        """Return how many bytes the values of a sparse gradient take as they travel."""
        segment = self.layout.segments[index]
        count = announced.nnz * math.prod(segment.shape[announced.dims :])
        if self.codec.applies_to(segment.dtype):
            return self.codec.encoded_bytes(count)
        return count * DTYPES[segment.dtype].itemsize

    @property
    def is_whole(self) -> bool:
        """Return whether every segment has a dense gradient."""
        return not self._announced and len(self.indices) == len(self.layout.segments)

    @property
    def dense(self) -> Sequence[int]:
        """Return the segments with a dense gradient."""
        if not self._announced:
            return self.indices
        return [index for index in self.indices if index not in self._announced]

    def borrow(self, buffers: FlatBuffers, own: FlatBuffers | None = None) -> None:
        """Use gradients that are there already, in memory that is only read.

        Args:
            buffers: where they are.
            own: memory for `secure_` to copy them to, which lasts beyond this push; None to take it then.
        """
        self.buffers, self.borrowed, self._own = buffers, True, own

    def journal_(self, reserve: Reserve | None) -> None:
        """Note that the gradients go to a journal, before there is memory for them.

        Args:
            reserve: returns memory of the journal, which they are received into; None to copy them there later.
        """
        self.journaled = True
        if reserve is not None:
            self._place, memory = reserve(self.room_bytes)
            self._room = Room(memory)

    def fill_again(self, payload: Payload | None, memory: memoryview) -> None:
        """Take gradients from a journal, for a push that happens again.

        Args:
            payload: says how they lie there; None for no gradients.
            memory: where they are; not to be changed.

        Raises:
            TensorMismatch: they have another size.
        """
        if payload is None or payload.packed:
            self.journal_(None)
            fill(self.allocate(), memory)
        else:
            if len(memory) < self.room_bytes:
                raise TensorMismatch(f"A payload has {len(memory)} bytes, and {self.room_bytes} are announced.")
            self._place, self._room, self.journaled = payload.place, Room(memory), True
            self.allocate()
        self.payload = payload
        self.decode_()

    @property
    def room_bytes(self) -> int:
        """Return the bytes of the memory that `allocate` takes."""
        sizes = self._travelling.sizes.items()
        dense = sum(padded(size * MEMORY_DTYPES[buffer].itemsize) for buffer, size in sizes)
        return dense + sum(
            padded(8 * each.dims * each.nnz) + padded(self._values_bytes(index, each))
            for index, each in self._announced.items()
        )

    def secure_(self) -> None:
        """Copy borrowed gradients to where their worker cannot write, and look for NaN and Inf in the copy."""
        theirs = self.buffers
        if theirs is None or not self.borrowed or self.payload is not None:
            return
        began = time.perf_counter()
        own = self._memory(self.on_wire) if self._own is None or self.journaled else self._own
        finite = not self._announced
        for first, last in self.on_wire.spans(self.dense):
            source, into = theirs.span(first, last), own.span(first, last)
            if source is not None and into is not None:
                finite = copy_finite_(into, source) and finite
        self.buffers, self.borrowed, self.reused, self._finite = own, False, own is self._own, finite
        self._note_payload(memory_of(own, self.on_wire, self._order))
        self.check_s += time.perf_counter() - began

    def _memory(self, layout: Layout) -> FlatBuffers:
        """Take memory for dense gradients."""
        room = self._room
        if room.memory is None:
            return FlatBuffers(layout, zero=False)
        flat = {buffer: room.empty((size,), MEMORY_DTYPES[buffer]) for buffer, size in layout.sizes.items()}
        return FlatBuffers(layout, flat=flat)

    def _note_payload(self, pieces: Sequence[memoryview]) -> None:
        """Note where the bytes are that came; a journal's memory is not to be changed."""
        if self.journaled:
            plain = self.is_whole and len(pieces) == 1
            self.payload = Payload(pieces, place=self._place, memory=self._room.memory, plain=plain)
            self.borrowed = self.borrowed or self._place is not None

    @property
    def known_finite(self) -> bool:
        """Return whether all gradients were looked at already, and found to be finite."""
        return self._finite or (self.watch is not None and self.watch.over)

    def half_precision(self) -> HalfPrecisionBuffers | None:
        """Return the dense gradients as they came in 16 bits; None if they came in their own dtypes."""
        if self.on_wire is self.layout or self.buffers is None:
            return None
        return HalfPrecisionBuffers(self.layout, self.codec, self.buffers)

    def copied_since(self, version: int) -> frozenset[int]:
        """Return the segments of a version that its step has written to `copy`."""
        return self.copied.segments if self.copied is not None and self.copied.version == version else frozenset()

    def allocate(self) -> list[memoryview]:
        """Take the memory and return it in the order of the wire."""
        views = self._allocate()
        self._note_payload(views)
        return views

    def _allocate(self) -> list[memoryview]:
        travelling = self._travelling
        memory = self._memory(travelling)
        if self.on_wire is travelling:
            self.buffers = memory
        else:
            self._encoded = memory
        if not self._announced:
            return memory_of(memory, travelling, self._order)
        views: list[memoryview] = []
        dense: list[int] = []
        for index in self.indices:
            if index not in self._announced:
                dense.append(index)
                continue
            views += memory_of(memory, travelling, dense)
            dense = []
            views += self._allocate_sparse(index)
        return views + memory_of(memory, travelling, dense)

    def look_while_arriving(self) -> None:
        """Look for NaN and Inf in what `allocate` made room for while it arrives, if it is much, and numbers."""
        buffers = self.buffers
        if buffers is not None and not self._announced and self.nbytes >= WATCH_FROM_BYTES:
            spans = [buffers.span(first, last) for first, last in self.on_wire.spans(self.indices)]
            self.watch = Watch([span for span in spans if span is not None])

    def _allocate_sparse(self, index: int) -> list[memoryview]:
        announced, segment = self._announced[index], self._travelling.segments[index]
        indices = self._room.empty((announced.dims, announced.nnz), torch.int64)
        dtype = MEMORY_DTYPES[segment.dtype]
        if segment.dtype == BYTES.name:
            values = self._room.empty((self._values_bytes(index, announced),), dtype)
        else:
            values = self._room.empty((announced.nnz, *segment.shape[announced.dims :]), dtype)
        self.sparse[index] = (indices, values)
        return [tensor_memory(indices), tensor_memory(values)]

    def widened(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a sparse gradient in its segment's dtype."""
        indices, values = self.sparse[index]
        return indices, values.to(TORCH_DTYPES[self.layout.segments[index].dtype])

    def own_(self) -> FlatBuffers:
        """Return the dense gradients in their own dtypes, in memory that may be changed."""
        if self.buffers is None or self.borrowed or self.on_wire is not self.layout:
            own = FlatBuffers(self.layout, zero=False)
            self.buffers = own if self.buffers is None else own.copy_(self.buffers, self.dense)
            self.on_wire, self.borrowed, self.reused = self.layout, False, False
        return self.buffers

    def spent(self) -> FlatBuffers | None:
        """Return memory of dense gradients in 16 bits, which is free once they were widened into a step."""
        return None if self.on_wire is self.layout or self.journaled else self.buffers

    def check_indices(self) -> None:
        """Refuse sparse indices outside their segment.

        Raises:
            TensorMismatch: naming the tensor.
        """
        for index, (indices, _) in self.sparse.items():
            segment = self.layout.segments[index]
            bounds = torch.tensor(
                segment.shape[: indices.shape[0]], dtype=torch.int64, device=indices.device
            ).unsqueeze(1)
            if indices.numel() and bool(((indices < 0) | (indices >= bounds)).any()):
                raise TensorMismatch(
                    f"The sparse gradient of {segment.name!r} has indices outside its shape {segment.shape}.",
                    field=segment.name,
                )


def memory_of(buffers: Buffers, layout: Layout, indices: Sequence[int]) -> list[memoryview]:
    """Return the bytes of segments in contiguous CPU buffers, neighbours in one view, in the order given."""
    flat = buffers.flat if isinstance(buffers, FlatBuffers) else {}
    if len(flat) == 1 and type(indices) is range and len(indices) == len(layout.segments):
        (whole,) = flat.values()
        if whole.nbytes == layout.nbytes:  # without gaps, which complex numbers may need before them
            return [tensor_memory(whole)]
    views = []
    for first, last in layout.spans(indices):
        span = buffers.span(first, last)
        if span is None:
            raise ValueError(f"segments {first} to {last} are not contiguous in memory")
        views.append(tensor_memory(span))
    return views


def on_device(buffers: Buffers, device: torch.device) -> Buffers:
    """Return the buffers themselves if they are there, else a copy on that device."""
    if buffers.device == device:
        return buffers
    if isinstance(buffers, HalfPrecisionBuffers):
        moved = FlatBuffers(buffers.memory.layout, device, zero=False).copy_(buffers.memory)
        return HalfPrecisionBuffers(buffers.layout, buffers.codec, moved)
    return FlatBuffers(buffers.layout, device, zero=False).copy_(buffers)


def _check_shape(segment: Segment, announced: Sparse) -> None:
    if not 1 <= announced.dims <= len(segment.shape):
        raise TensorMismatch(
            f"The sparse gradient of {segment.name!r} has {announced.dims} sparse dimensions of {len(segment.shape)}.",
            field=segment.name,
        )
