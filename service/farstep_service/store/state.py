"""The optimizer state of a session: flat buffers for what each element has, counts for what each segment has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.hyper import Hyper
from farstep_service.layout import Layout
from farstep_service.rule import AnyRule, Counts
from farstep_service.store.buffers import Buffers, FlatBuffers

PARAMETERS = "param"
"""The field name of the parameters themselves."""

Number = float | int
FieldValues = Buffers | Sequence[Number | None]
"""A field of some segments: buffers in the session's layout, or one number for each of the segments named."""


@final
class State:
    """Hold the element fields, and know what state is allowed to be.

    Args:
        layout: the segments.
        rule: the optimizer.
        groups: options of each param group at construction; they say what state begins with.
        device: where the element fields are kept.
    """

    def __init__(self, layout: Layout, rule: AnyRule, groups: Sequence[Hyper], device: torch.device) -> None:
        self._layout = layout
        self._rule = rule
        self._groups = tuple(groups)
        self.fields: dict[str, FlatBuffers] = {name: FlatBuffers(layout, device) for name in rule.element_fields}
        self.refill([segment for segment in range(len(layout.segments)) if self._begins_filled(segment)])

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return sum(buffers.nbytes for buffers in self.fields.values())

    def stretches(self, first: int, length: int) -> tuple[Tensor, ...]:
        """Return each element field's memory, as `Buffers.stretch` does."""
        return tuple(buffers.stretch(first, length) for buffers in self.fields.values())

    def newborn(self, segment: int) -> Counts | None:
        """Return the counts of a segment that has not stepped; None if its state begins with its first step."""
        return self._first(segment) if self._rule.eager else None

    def refill(self, segments: Sequence[int]) -> None:
        """Fill the element fields of segments with what they begin with."""
        for name, buffers in self.fields.items():
            for segment in segments:
                value = self._rule.initial(name, self._options(segment))
                stretch = buffers.stretch(segment, self._layout.segments[segment].length)
                stretch.fill_(value)

    def _begins_filled(self, segment: int) -> bool:
        """Say whether state begins with anything but zeros, which is what fresh memory holds without being touched."""
        return any(self._rule.initial(name, self._options(segment)) != 0 for name in self.fields)

    def check_field(self, field: str, known: Sequence[str]) -> None:
        """Refuse a field that is not one of `known`."""
        if field not in known:
            raise TensorMismatch(f"{self._rule.name} has no such field {field!r:.80}: {', '.join(known)}.", field=field)

    def counts_with(
        self, counts: Sequence[Counts | None], segments: Sequence[int], contents: Mapping[str, FieldValues]
    ) -> list[Counts | None]:
        """Check other contents for some segments and return the counts they lead to; nothing is written.

        Raises:
            TensorMismatch: an unknown field, another layout, or a number that no segment can have.
        """
        after = list(counts)
        for field, values in contents.items():
            if not isinstance(values, Buffers):
                continue
            if values.layout is not self._layout and values.layout != self._layout:
                raise TensorMismatch(f"`{field}` is not in the session's layout.", field=field)
            if field != PARAMETERS:
                self.check_field(field, self._rule.element_fields)
                for segment in segments:
                    after[segment] = after[segment] or self._first(segment)
        for field, values in contents.items():
            if isinstance(values, Buffers):
                continue
            self.check_field(field, self._rule.segment_fields)
            if len(values) != len(segments):
                raise TensorMismatch(f"{field} has {len(values)} numbers for {len(segments)} segments.", field=field)
            for segment, value in zip(segments, values, strict=True):
                before = after[segment] or self._first(segment)
                after[segment] = None if value is None else _with(before, field, value)
        return after

    def _first(self, segment: int) -> Counts:
        return self._rule.first(self._options(segment))

    def _options(self, segment: int) -> Hyper:
        return self._groups[self._layout.segments[segment].group]


def _with(counts: Counts, field: str, value: Number) -> Counts:
    number = float(value) if type(value) in (int, float) else math.nan
    if not math.isfinite(number) or (field == "step" and (number < 0 or number != int(number))):
        raise TensorMismatch(f"{field}={value!r:.80} is not what a segment can have.", field=field)
    change: dict[str, Any] = {field: int(value) if field == "step" else number}
    return replace(counts, **change)
