"""Fields of a session on their way in or out: parameters, views such as their average, state, and numbers per segment.

On the wire a field is, for each segment in order, its bytes in the parameter's dtype and the field's shape; a field of
numbers is one float64 per segment. Which fields a segment has is such a number too; `farstep.protocol.fields` says
how to read it. A free field is one tensor of a shape that travels with it, or one float64, and belongs to the first
segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from farstep.errors import InvalidOption, TensorMismatch
from farstep.protocol.dtypes import DTYPES, NUMBER
from farstep.protocol.fields import PRESENT, Shapes, names_of, shape_of
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from farstep.protocol.tensor_file import Entry
from farstep_service.layout import Layout, Segment
from farstep_service.optimizers.rule import AnyMethod, Fields
from farstep_service.store import FlatBuffers
from farstep_service.tensors.contribution import memory_of

PARAM = "param"


class Contents:
    """Some fields of some segments, in memory of their own.

    Args:
        layout: the session's.
        rule: says which fields there are.
        fields: the fields, in the order of the payload.
        indices: the segments.
        shapes: of free fields.
        views: the names of what the session keeps beside parameters and state, in the form of the parameters.

    Raises:
        InvalidOption: a field the session does not have.
        TensorMismatch: shapes of other fields than the free ones, or free fields without the first segment.
    """

    def __init__(
        self,
        layout: Layout,
        rule: AnyMethod,
        fields: Sequence[str],
        indices: Sequence[int],
        shapes: Shapes | None = None,
        *,
        views: Sequence[str] = (),
    ) -> None:
        known = (PARAM, *rule.tensor_fields, *rule.number_fields, PRESENT, *views)
        for name in fields:
            if name not in known:
                raise InvalidOption(
                    f"{rule.name} has no field {name!r:.80}.", remedy=f"It has {', '.join(known)}.", field="fields"
                )
        self.fields = tuple(fields)
        self.indices = indices
        self._layout = layout
        self._kinds = rule.kinds
        self._numbers = frozenset((*rule.number_fields, PRESENT))
        self.elements: dict[str, FlatBuffers] = {}
        self.numbers: dict[str, Tensor] = {}
        self.free: dict[str, Tensor] = {}
        self.shapes: Shapes = shapes or {}
        if self.shapes.keys() != {name for name in fields if self._kinds.get(name) == "free"}:
            raise TensorMismatch("`shapes` must name the fields that have a shape of their own.", field="shapes")
        if self.shapes and 0 not in indices:
            raise TensorMismatch(
                f"{rule.name} keeps its state with the first parameter, which is not among these.", field="segments"
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes of the payload."""
        return sum(self._bytes_of(name) for name in self.fields)

    def _bytes_of(self, name: str) -> int:
        if name in self._numbers:
            return 8 * len(self.indices)
        if name in self.shapes:
            shape = self.shapes[name]
            return 8 if shape is None else math.prod(shape) * self._free_dtype.itemsize
        return self._layout_of(name).bytes_of(self.indices)

    @property
    def _free_dtype(self) -> torch.dtype:
        (buffer,) = self._layout.sizes
        return TORCH_DTYPES[buffer]

    def _layout_of(self, name: str) -> Layout:
        return self._layout.derived(self._kinds.get(name, "element"))

    def allocate(self) -> list[memoryview]:
        """Take the memory and return it in the order of the wire."""
        for name in self.fields:
            if name in self._numbers:
                self.numbers[name] = torch.zeros(len(self.indices), dtype=torch.float64, device="cpu")
            elif name in self.shapes:
                shape = self.shapes[name]
                dtype = torch.float64 if shape is None else self._free_dtype
                self.free[name] = torch.empty(shape or (), dtype=dtype, device="cpu")
            else:
                self.elements[name] = FlatBuffers(self._layout_of(name), zero=False)
        return self.memory()

    def memory(self) -> list[memoryview]:
        """Return the bytes in the order of the wire."""
        views: list[memoryview] = []
        for name in self.fields:
            if name in self.numbers:
                views.append(tensor_memory(self.numbers[name]))
            elif name in self.free:
                views.append(tensor_memory(self.free[name]))
            else:
                views += memory_of(self.elements[name], self._layout_of(name), self.indices)
        return views

    def entries(self) -> list[Entry]:
        """Describe the tensors of a session file: `step` for numbers, `exp_avg/weight` for each segment otherwise.

        A segment that never has a field has no tensor for it, and a free field is one tensor for all.
        """
        found: list[Entry] = []
        for name in self.fields:
            if name in self._numbers:
                found.append(Entry(name, NUMBER.name, (len(self.indices),)))
            if name in self.shapes:
                (buffer,), shape = self._layout.sizes, self.shapes[name]
                found.append(Entry(name, NUMBER.name if shape is None else buffer, shape or ()))
            for _, segment in self._possible(name):
                dtype = DTYPES[segment.dtype]
                pair = (dtype.parts,) if segment.is_complex else ()
                found.append(Entry(f"{name}/{segment.name}", dtype.real, (*segment.shape, *pair)))
        return found

    def memory_of_entries(self) -> list[memoryview]:
        """Return the bytes of each of `entries()`."""
        views: list[memoryview] = []
        for name in self.fields:
            if name in self._numbers:
                views.append(tensor_memory(self.numbers[name]))
            if name in self.shapes:
                views.append(tensor_memory(self.free[name]))
            for index, segment in self._possible(name):
                views.append(tensor_memory(self.elements[name].stretch(index, segment.length)))
        return views

    def _possible(self, name: str) -> Iterator[tuple[int, Segment]]:
        """Go through the segments that can have a field, as they are in the layout of that field."""
        if name in self._numbers or name in self.shapes:
            return
        kind, layout = self._kinds.get(name, "element"), self._layout_of(name)
        for index in self.indices:
            if shape_of(kind, self._layout.segments[index].shape) is not None:
                yield index, layout.segments[index]

    def has(self) -> list[Fields | None] | None:
        """Return which fields each segment has by its `present`, None for one without state; None if it is not here.

        Raises:
            TensorMismatch: a number that stands for no set of fields, or for one that the segment cannot have.
        """
        if PRESENT not in self.numbers:
            return None
        order = tuple(self._kinds)
        try:
            has = [names_of(mask, order) if mask else None for mask in self.numbers[PRESENT].tolist()]
        except ValueError as exc:
            raise TensorMismatch(str(exc), field=PRESENT) from exc
        for index, names in zip(self.indices, has, strict=True):
            self._check_possible(index, names or ())
        return has

    def _check_possible(self, index: int, names: Fields) -> None:
        segment = self._layout.segments[index]
        for name in names:
            if self._kinds[name] != "free" and shape_of(self._kinds[name], segment.shape) is None:
                raise TensorMismatch(
                    f"{segment.name!r} of shape {list(segment.shape)} is said to have {name!r}, which it never has.",
                    field=PRESENT,
                )
