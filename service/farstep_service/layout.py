"""The layout of a session's parameters: segments, back to back in one flat buffer per dtype.

    parameter (user)      segment (wire order)                     flat buffer (server)
    w   (3, 4) float32    0: float32 [ 0, 12)                      float32   | w w w w w w w w w w w w | z z z z |
    h   (5,)   bfloat16   1: bfloat16 [ 0,  5)                     bfloat16  | h h h h h |
    z   (2,) complex64    2: float32 [12, 16), as 2 x 2 reals

A layout is plain data, without tensors or torch. Segments keep the order of the parameters, which is the order on the
wire. Offsets and lengths count elements of the real dtype in which the segment is stored. The only padding is one
element before a complex segment at an odd offset, so neighbours of one dtype are one contiguous span. A layout only
grows at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Self

from farstep.errors import LimitExceeded, TensorMismatch
from farstep.protocol.codecs import Codec
from farstep.protocol.dtypes import BYTES, DTYPES, Dtype, segment_dtype
from farstep.protocol.fields import FieldKind, shape_of
from farstep.protocol.ranges import from_ranges

MAX_SEGMENTS = 100_000
MAX_DIMENSIONS = 16
MAX_NAME_BYTES = 256
MAX_TOTAL_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """A client's description of one parameter; nothing in it has been checked, not even the types."""

    name: object
    shape: Sequence[object]
    dtype: object
    group: object = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """The position of one parameter.

    Attributes:
        name: the parameter's name, unique in the session.
        shape: the parameter's shape; `()` is a scalar.
        dtype: the parameter's dtype under its wire name.
        group: the parameter group it belongs to.
        buffer: the real dtype whose flat buffer holds it.
        offset: its first element in that buffer.
        length: its elements in that buffer, two for each complex number.
        nbytes: its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    buffer: str
    offset: int
    length: int
    nbytes: int

    @property
    def stop(self) -> int:
        """Return the end of its range of elements."""
        return self.offset + self.length

    @property
    def is_complex(self) -> bool:
        """Return whether the parameter is complex, stored as pairs of reals."""
        return self.dtype != self.buffer


@dataclass(frozen=True)
class Layout:
    """The segments of a session and the size of each flat buffer.

    Attributes:
        segments: the segments in the order of the wire.
        sizes: elements of each flat buffer, by dtype.
        nbytes: bytes of all parameters together.
    """

    segments: tuple[Segment, ...]
    sizes: Mapping[str, int]
    nbytes: int

    @classmethod
    def build(cls, specs: Iterable[SegmentSpec]) -> Self:
        """Lay the parameters out in the order given.

        Raises:
            TensorMismatch: a name, shape, dtype or group is not acceptable.
            LimitExceeded: it has more segments, dimensions or bytes than a session may have.
        """
        return cls.empty().append(specs)

    @classmethod
    def empty(cls) -> Self:
        """Return a layout without segments."""
        return cls((), MappingProxyType({}), 0)

    def append(self, specs: Iterable[SegmentSpec]) -> Self:
        """Return this layout with more segments at its end; the present ones keep their positions."""
        segments, sizes, nbytes = list(self.segments), dict(self.sizes), self.nbytes
        names = {segment.name for segment in segments}
        for spec in specs:
            if len(segments) == MAX_SEGMENTS:
                raise LimitExceeded(
                    f"The session has more than {MAX_SEGMENTS} parameters.", field="segments", limit=MAX_SEGMENTS
                )
            name, shape, group = _checked(spec, names)
            names.add(name)
            dtype = segment_dtype(spec.dtype, field=name)
            nbytes += math.prod(shape) * dtype.itemsize
            if nbytes > MAX_TOTAL_BYTES:
                raise LimitExceeded(
                    f"Tensor {name!r} of shape {shape} makes the session larger than {MAX_TOTAL_BYTES} bytes.",
                    field=name,
                    limit=MAX_TOTAL_BYTES,
                )
            segments.append(_placed(sizes, name, shape, dtype, group))
        return type(self)(tuple(segments), MappingProxyType(sizes), nbytes)

    def first(self, groups: int) -> Self:
        """Return this layout as it was with only the first `groups` param groups."""
        count = len(self.segments)
        while count and self.segments[count - 1].group >= groups:
            count -= 1
        sizes: dict[str, int] = {}
        for segment in self.segments[:count]:
            sizes[segment.buffer] = segment.stop
        return type(self)(self.segments[:count], MappingProxyType(sizes), self.bytes_of(range(count)))

    @cached_property
    def elements(self) -> int:
        """Return the number of elements of all parameters; a complex one counts once."""
        return sum(math.prod(segment.shape) for segment in self.segments)

    @cached_property
    def groups(self) -> int:
        """Return the number of parameter groups, the highest group's number plus one."""
        return 1 + max((segment.group for segment in self.segments), default=-1)

    def derived(self, kind: FieldKind) -> Layout:
        """Return the layout of a state field: these segments in its shapes, empty for parameters without it."""
        if kind in ("element", "optional"):
            return self
        if kind not in self._derived:
            shapes = [shape_of(kind, segment.shape) for segment in self.segments]
            self._derived[kind] = Layout.empty().append(
                SegmentSpec(segment.name, (0,) if shape is None else shape, segment.dtype, segment.group)
                for segment, shape in zip(self.segments, shapes, strict=True)
            )
        return self._derived[kind]

    def on_wire(self, codec: Codec) -> Layout:
        """Return the layout of encoded parameters or gradients; this one if the codec applies to none of them.

        It has the same segments, of the dtype of encoded elements, or flat bytes. They may lie in other buffers, with
        other neighbours.
        """
        found = self._on_wire.get(codec)
        if found is None:
            if not any(codec.applies_to(each.dtype) for each in self.segments):
                self._on_wire[codec] = self
                return self
            sizes: dict[str, int] = {}
            segments = []
            for each in self.segments:
                shape, dtype = each.shape, DTYPES[each.dtype]
                if codec.applies_to(each.dtype):
                    if codec.element is None:
                        shape, dtype = (codec.encoded_bytes(math.prod(shape)),), BYTES
                    else:
                        dtype = DTYPES[codec.element]
                segments.append(_placed(sizes, each.name, shape, dtype, each.group))
            nbytes = sum(each.nbytes for each in segments)
            found = self._on_wire[codec] = Layout(tuple(segments), MappingProxyType(sizes), nbytes)
        return found

    def apart_on_wire(self, codec: Codec) -> frozenset[int]:
        """Return the segments that directly follow the one before them here, but not in the encoded layout."""
        wire = self.on_wire(codec)
        if wire is self:
            return frozenset()
        found = self._apart_on_wire.get(codec)
        if found is None:
            before: dict[str, Segment] = {}
            apart = set()
            for index, (here, there) in enumerate(zip(self.segments, wire.segments, strict=True)):
                last = before.get(here.buffer)
                if last is not None and (last.buffer != there.buffer or last.stop != there.offset):
                    apart.add(index)
                before[here.buffer] = there
            found = self._apart_on_wire[codec] = frozenset(apart)
        return found

    @cached_property
    def _apart_on_wire(self) -> dict[Codec, frozenset[int]]:
        return {}

    @cached_property
    def _on_wire(self) -> dict[Codec, Layout]:
        return {}

    @cached_property
    def _derived(self) -> dict[FieldKind, Layout]:
        return {}

    def chosen(self, ranges: list[int] | None) -> Sequence[int]:
        """Return the segments in a header's ranges `[start, stop, start, stop, ...]`; all for None.

        Raises:
            InvalidRequest: the ranges are not ascending, or reach beyond the last segment.
        """
        if ranges is None:
            return range(len(self.segments))
        return from_ranges(ranges, len(self.segments))

    def bytes_of(self, segments: Iterable[int]) -> int:
        """Return the size of a payload of these segments."""
        return sum(self.segments[index].nbytes for index in segments)

    def spans(self, segments: Sequence[int]) -> list[tuple[int, int]]:
        """Cut a list of segments into half-open spans `(first, last)` that are contiguous in a flat buffer.

        The spans keep the order given, so their bytes one after the other are the bytes of the segments.
        """
        if segments == range(len(self.segments)):
            return self._whole
        return self._spans(segments)

    @cached_property
    def _whole(self) -> list[tuple[int, int]]:
        return self._spans(range(len(self.segments)))

    def _spans(self, segments: Sequence[int]) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for index in segments:
            if spans and spans[-1][1] == index and self._follows(index):
                spans[-1] = (spans[-1][0], index + 1)
            else:
                spans.append((index, index + 1))
        return spans

    def stretch(self, first: int, last: int) -> int | None:
        """Return the number of elements from segment `first` to before `last`, None if empty or not contiguous."""
        known = self._stretches
        if (first, last) not in known:
            if len(known) > 2 * len(self.segments):
                known.clear()
            together = first < last and all(map(self._follows, range(first + 1, last)))
            known[first, last] = self.segments[last - 1].stop - self.segments[first].offset if together else None
        return known[first, last]

    @cached_property
    def _stretches(self) -> dict[tuple[int, int], int | None]:
        return {}

    def _follows(self, index: int) -> bool:
        """Return whether a segment begins where the one before it ends."""
        before, segment = self.segments[index - 1], self.segments[index]
        return before.buffer == segment.buffer and before.stop == segment.offset


def _placed(sizes: dict[str, int], name: str, shape: tuple[int, ...], dtype: Dtype, group: int) -> Segment:
    """Return a segment behind those of these sizes, and increase the sizes."""
    elements = math.prod(shape)
    offset = sizes.get(dtype.real, 0)
    offset += offset % (1 if dtype.name == dtype.real else 2)  # pairs of reals are complex only at even places
    length = elements * dtype.parts
    sizes[dtype.real] = offset + length
    return Segment(name, shape, dtype.name, group, dtype.real, offset, length, elements * dtype.itemsize)


def _checked(spec: SegmentSpec, names: set[str]) -> tuple[str, tuple[int, ...], int]:
    """Return a parameter's name, shape and group; refuse an invalid one."""
    name = spec.name
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise TensorMismatch(
            f"{name!r:.300} is no name for a parameter.",
            field="name",
            limit=MAX_NAME_BYTES,
            remedy=f"Use 1 to {MAX_NAME_BYTES} bytes of printable text.",
        )
    if name in names:
        raise TensorMismatch(f"Two parameters are called {name!r}.", field=name, remedy="Names are unique.")
    if len(spec.shape) > MAX_DIMENSIONS:
        raise LimitExceeded(f"Tensor {name!r} has {len(spec.shape)} dimensions.", field=name, limit=MAX_DIMENSIONS)
    numbers = [number for number in (*spec.shape, spec.group) if type(number) is int and 0 <= number <= MAX_TOTAL_BYTES]
    if len(numbers) <= len(spec.shape):
        raise TensorMismatch(
            f"Tensor {name!r} has shape {list(spec.shape)!r:.300} and group {spec.group!r:.50}.",
            field=name,
            remedy="Dimensions and groups are integers from 0 up.",
        )
    *shape, group = numbers
    if group >= MAX_SEGMENTS:
        raise LimitExceeded(f"Tensor {name!r} is in group {group}.", field=name, limit=MAX_SEGMENTS)
    return name, tuple(shape), group
