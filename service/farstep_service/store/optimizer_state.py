"""The optimizer state of a session: flat buffers for its tensors, and counts for each segment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.fields import PRECISIONS, SINGLE
from farstep.protocol.hyper import Hyper
from farstep_service.layout import Layout
from farstep_service.optimizers.rule import PRECISION, AnyRule, Fields, SegmentCounters
from farstep_service.store.buffers import Buffers, FlatBuffers

PARAMETERS = "param"
"""The field name of the parameters themselves."""

Number = float | int
FieldValues = Buffers | Sequence[Number | None]
"""A field of some segments: buffers in the session's layout, or one number for each of the segments named."""


@final
class OptimizerState:
    """The tensor fields, and the checks of state. Optional fields are allocated when they are used.

    Args:
        layout: the segments.
        rule: the optimizer.
        groups: options of each param group at construction, which define the initial state.
        device: the device of the tensor fields.

    Attributes:
        nbytes: the bytes allocated.
    """

    def __init__(self, layout: Layout, rule: AnyRule, groups: Sequence[Hyper], device: torch.device) -> None:
        self._layout = layout
        self._rule = rule
        self._groups = tuple(groups)
        self._device = device
        self._layouts = {name: layout.derived(kind) for name, kind in rule.kinds.items() if name in rule.tensor_fields}
        self.fields: dict[str, FlatBuffers] = {}
        self.nbytes = 0
        self.take_memory(name for name in rule.tensor_fields if name not in rule.optional_fields)
        self.refill([segment for segment in range(len(layout.segments)) if self._begins_filled(segment)])

    def appended(self, layout: Layout, groups: Sequence[Hyper]) -> OptimizerState:
        """Return a copy of this state, extended by the initial state of the new segments of a longer layout.

        Args:
            layout: this one with more segments.
            groups: options of its param groups; those of the present groups are ignored.
        """
        grown = OptimizerState(layout, self._rule, (*self._groups, *groups[len(self._groups) :]), self._device)
        for name, buffers in self.fields.items():
            grown.memory(name).copy_(buffers, range(len(self._layout.segments)))
        return grown

    def missing_bytes(self, names: Iterable[str]) -> int:
        """Return the bytes that allocating these fields would take, without those allocated."""
        return sum(self._layouts[name].nbytes for name in names if name not in self.fields)

    def memory(self, name: str) -> FlatBuffers:
        """Return a tensor field's memory, which is allocated on first use."""
        if name not in self.fields:
            self.fields[name] = FlatBuffers(self._layouts[name], self._device)
            self.nbytes += self.fields[name].nbytes
        return self.fields[name]

    def take_memory(self, names: Iterable[str]) -> None:
        """Allocate the memory of fields."""
        for name in names:
            if name not in self.fields:
                self.memory(name)

    def stretches(self, first: int, length: int, optional: Fields) -> dict[str, Tensor]:
        """Return the memory of the fields of an elementwise rule, as `Buffers.stretch` does."""
        return {name: self.fields[name].stretch(first, length) for name in self._rule.fields(optional)}

    def tensors(self, segment: int, optional: Fields) -> dict[str, Tensor]:
        """Return the memory of one segment's fields, in their shapes."""
        shape = self._layout.segments[segment].shape
        return {name: self.fields[name].segment(segment) for name in self._rule.fields(optional, shape)}

    def initial_counts(self, segment: int) -> SegmentCounters | None:
        """Return the counts of a segment before its first step; None if that creates the state."""
        return self._having(segment, None, ()) if self._rule.has_initial_state else None

    def refill(self, segments: Sequence[int]) -> None:
        """Fill the tensor fields of segments with their initial values."""
        for name, buffers in self.fields.items():
            for segment in segments:
                value = self._rule.initial(name, self._options(segment))
                buffers.stretch(segment, buffers.layout.segments[segment].length).fill_(value)

    def clear_absent(self, segments: Sequence[int], counts: Sequence[SegmentCounters | None]) -> None:
        """Clear the optional fields that segments with state lack, so that they start anew when used."""
        for name in self._rule.optional_fields:
            if name in self.fields:
                for segment in segments:
                    own = counts[segment]
                    if own and name not in own.fields:
                        self.fields[name].stretch(segment, self._layout.segments[segment].length).zero_()

    def _begins_filled(self, segment: int) -> bool:
        """Return whether the initial state is anything but zeros, which fresh memory holds already."""
        return any(self._rule.initial(name, self._options(segment)) != 0 for name in self.fields)

    def check_field(self, field: str, known: Sequence[str]) -> None:
        """Refuse an unknown field."""
        if field not in known:
            raise TensorMismatch(f"{self._rule.name} has no such field {field!r:.80}: {', '.join(known)}.", field=field)

    def counts_with(
        self,
        counts: Sequence[SegmentCounters | None],
        segments: Sequence[int],
        contents: Mapping[str, FieldValues],
        has: Sequence[Fields | None] | None,
    ) -> list[SegmentCounters | None]:
        """Check other contents for some segments and return the resulting counts; nothing is written.

        Args:
            counts: of every segment.
            segments: those that are written to.
            contents: what is written.
            has: for each of `segments` the tensor fields it has afterwards; see `Store.write`.

        Raises:
            TensorMismatch: an unknown field, another layout, or an invalid number.
        """
        after = list(counts)
        for field, values in contents.items():
            if not isinstance(values, Buffers):
                continue
            if field != PARAMETERS:
                self.check_field(field, self._rule.tensor_fields)
            layout = self._layouts.get(field, self._layout)
            if values.layout is not layout and values.layout != layout:
                raise TensorMismatch(f"`{field}` is not in the session's layout.", field=field)
            if field != PARAMETERS:
                for segment in segments:
                    after[segment] = self._having(segment, after[segment], (field,))
        # A precision first: it says how the numbers beside it are rounded.
        for field, values in sorted(contents.items(), key=lambda each: each[0] not in self._rule.own_fields):
            if isinstance(values, Buffers):
                continue
            self.check_field(field, self._rule.number_fields)
            if len(values) != len(segments):
                raise TensorMismatch(f"{field} has {len(values)} numbers for {len(segments)} segments.", field=field)
            for segment, value in zip(segments, values, strict=True):
                before = self._having(segment, after[segment], ())
                after[segment] = None if value is None else _with(before, field, value)
        if has is not None and not self._rule.has_initial_state:
            for segment, names in zip(segments, has, strict=True):
                bare = replace(after[segment] or self._rule.first(self._options(segment)), fields=())
                after[segment] = None if names is None else self._having(segment, bare, names)
        return after

    def _having(self, segment: int, counts: SegmentCounters | None, more: Iterable[str]) -> SegmentCounters:
        """Return counts, by default those of a new state, with these tensor fields added."""
        counts = counts or self._rule.first(self._options(segment))
        shape = self._layout.segments[segment].shape
        return replace(counts, fields=self._rule.fields((*counts.fields, *more), shape))

    def _options(self, segment: int) -> Hyper:
        return self._groups[self._layout.segments[segment].group]


def _with(counts: SegmentCounters, field: str, value: Number) -> SegmentCounters:
    number = float(value) if type(value) in (int, float) else math.nan
    if not math.isfinite(number) or (field == "step" and (number < 0 or number != int(number))):
        raise TensorMismatch(f"{field}={value!r:.80} is not what a segment can have.", field=field)
    if field == PRECISION:
        number = number or SINGLE  # a segment without state sends 0
        if number not in PRECISIONS:
            raise TensorMismatch(
                f"{field}={value!r:.80} is none of {', '.join(map(str, PRECISIONS))}, the significand bits of a dtype.",
                field=field,
            )
    change: dict[str, Any] = {field: int(number) if field in ("step", PRECISION) else number}
    return replace(counts, **change)
