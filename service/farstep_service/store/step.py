"""One step on its way: everything it will do, decided before anything is written, and how far it has come.

    begin      copies unchanged segments into the new version's memory      (only if the old one is held)
    calls      one per run, on dense gradients, and one per sparse gradient that was made dense
    rows       one per sparse gradient whose rows alone change
    end        brings results to where their owner finds them               (only memory of the user)

Each part can be stopped anywhere, by a kernel that fails or by an interrupt from the keyboard, and be continued: what
has been done is never done twice, but for plain copies, which do not mind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from farstep.errors import InvalidOption
from farstep_service.kernel import Call, Kernel, Progress, Write
from farstep_service.rule import AnyRule, Counts, ElementwiseRule, RowRule
from farstep_service.store.buffers import Buffers, FlatBuffers, flattened, shaped
from farstep_service.store.gradients import Gradients, Rows
from farstep_service.store.runs import Decision, Numbers
from farstep_service.store.state import State
from farstep_service.store.versions import Memory

Ran = Literal["reference", "fused", "mixed"]
"""Which kernel ran a step; `mixed` is one whose fused kernel failed midway and that the reference kernel finished."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A step that is complete.

    Attributes:
        version: the version it made.
        kernel: what ran it; replay with the same kernel gives the same bits.
        runs: kernel calls it took.
        again: it is part of a larger step, which goes on with another evaluation of the objective.
    """

    version: int
    kernel: Ran
    runs: int
    again: bool = False


@dataclass(frozen=True, slots=True)
class Contents:
    """A version without its tensors.

    Attributes:
        version: its number.
        counts: for each segment what it has lived through; None without state.
        changed: for each segment the version that last changed its parameter.
    """

    version: int
    counts: Sequence[Counts | None]
    changed: Sequence[int]


class RowCall(NamedTuple):
    """One sparse gradient whose rows a step changes, and no other."""

    rule: RowRule[Any]
    rows: Rows
    numbers: Numbers


@final
@dataclass(slots=True)
class Step:
    """A step that has been decided.

    Attributes:
        source, target: parameters before and after; the same memory if nobody holds the version before.
        state: the tensor fields that there are.
        gradients: what it is computed from; they must stay as they are until the step is complete.
        touched: the segments it changes.
        stale: the segments to copy from source to target first.
        calls, rows: what it does.
        after: the contents it makes.
    """

    source: Buffers
    target: Memory
    state: State
    gradients: Gradients
    touched: list[int]
    stale: list[int]
    calls: list[Call]
    rows: list[RowCall]
    after: Contents
    progress: Progress = field(default_factory=Progress)
    row_progress: Progress = field(default_factory=Progress)
    copied: bool = False
    kernels: list[str] = field(default_factory=list)

    def carry_out(self, kernel: Kernel) -> Applied:
        """Do what is left of the step.

        Raises:
            Exception: whatever the kernel raised; the step can be continued.
        """
        if not self.copied:
            if self.stale and isinstance(self.target.buffers, FlatBuffers):
                self.target.buffers.copy_(self.source, self.stale)
            self.copied = True
        before = self.progress.at
        try:
            kernel.execute(self.calls, self.progress)
        finally:
            if self.progress.at is not before:
                self.kernels.append(kernel.name)
        self.row_progress.resume()
        while (number := self.row_progress.at.call) < len(self.rows):
            self.row_progress.commit(self._writes(number), call=number + 1)
        self.target.buffers.end(self.touched)
        ran: Ran = "reference"
        if "fused" in self.kernels:
            ran = "fused" if len(set(self.kernels)) == 1 else "mixed"
        return Applied(self.after.version, ran, len(self.calls) + len(self.rows))

    def _writes(self, number: int) -> list[Write]:
        """Compute the new rows of one sparse gradient."""
        rule, its, (scalars, optional) = self.rows[number]
        segment = self.source.layout.segments[its.segment]

        def matrix(buffers: Buffers) -> Tensor:
            return shaped(buffers.stretch(its.segment, segment.length), segment).view(its.shape)

        old = {name: field.view(its.shape) for name, field in self.state.tensors(its.segment, optional).items()}
        rows = {name: field[its.rows] for name, field in old.items()}
        p, state = rule.update_rows(matrix(self.source)[its.rows], its.values, rows, scalars)
        return [
            Write(matrix(self.target.buffers), p, its.rows),
            *(Write(old[name], values, its.rows) for name, values in state.items()),
        ]


def check_numbers(steps: Iterable[tuple[torch.dtype, tuple[float, ...]]]) -> None:
    """Refuse a step whose numbers its dtype cannot hold, which torch's operations would refuse one by one, midway.

    Raises:
        InvalidOption: naming the number and the dtype.
    """
    for dtype, numbers in steps:
        limit = torch.finfo(dtype).max
        for number in numbers:
            if limit < abs(number) < math.inf:
                raise InvalidOption(
                    f"With these options the step takes the number {number:g}, beyond {dtype}.",
                    remedy="Correct the group options.",
                    limit=limit,
                )


@final
class Caller:
    """Make the kernel calls of a step.

    Args:
        rule: the optimizer.
        source, target: parameters before and after.
        state: the optimizer state, with the memory of every field in use.
    """

    def __init__(self, rule: AnyRule, source: Buffers, target: Buffers, state: State) -> None:
        self._rule = rule
        self._source = source
        self._target = target
        self._state = state

    def dense(self, decision: Decision, gradients: Buffers) -> list[Call]:
        """Return one call for each run that has elements."""
        runs = zip(decision.cut.runs, decision.runs, strict=True)
        return [
            self._call(run.members[0], run.length, gradients.stretch(run.members[0], run.length), numbers)
            for run, numbers in runs
            if run.length
        ]

    def spread(self, gradients: Sequence[tuple[Rows, Numbers]]) -> list[Call]:
        """Return one call for each sparse gradient that is made dense and has elements."""
        segments = self._source.layout.segments
        return [
            self._call(its.segment, length, flattened(its.dense()), numbers)
            for its, numbers in gradients
            if (length := segments[its.segment].length)
        ]

    def _call(self, first: int, length: int, g: Tensor, numbers: Numbers) -> Call:
        p = self._source.stretch(first, length)
        if g.device != p.device:
            g = g.to(p.device)
        out = p if self._target is self._source else self._target.stretch(first, length)
        scalars, optional = numbers
        if isinstance(self._rule, ElementwiseRule):
            return Call(p, g, self._state.stretches(first, length, optional), out, scalars)
        segment = self._source.layout.segments[first]
        p, g, out = (shaped(each, segment) for each in (p, g, out))
        return Call(p, g, self._state.tensors(first, optional), out, scalars)
