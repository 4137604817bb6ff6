"""One step on its way: everything it will do, decided before anything is written, and how far it has come.

    begin      copies unchanged segments into the new version's memory      (only if the old one is held)
    calls      one per run, on dense gradients
    rows       one per sparse gradient
    end        brings results to where their owner finds them               (only memory of the user)

Each part can be stopped anywhere, by a kernel that fails or by an interrupt from the keyboard, and be continued: what
has been done is never done twice, but for plain copies, which do not mind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from farstep.errors import InvalidOption
from farstep_service.rule import AnyRule, Call, Counts, Kernel, Progress, Write
from farstep_service.store.buffers import Buffers, FlatBuffers, shaped
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


@final
@dataclass(slots=True)
class Step:
    """A step that has been decided.

    Attributes:
        rule: what computes it.
        source, target: parameters before and after; the same memory if nobody holds the version before.
        state: the element fields that there are.
        gradients: what it is computed from; they must stay as they are until the step is complete.
        touched: the segments it changes.
        stale: the segments to copy from source to target first.
        calls, rows: what it does.
        row_numbers: the numbers for each of `rows`.
        after: the contents it makes.
    """

    rule: AnyRule
    source: Buffers
    target: Memory
    state: Mapping[str, FlatBuffers]
    gradients: Gradients
    touched: list[int]
    stale: list[int]
    calls: list[Call]
    rows: list[Rows]
    row_numbers: list[Numbers]
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
        its = self.rows[number]
        segment = self.source.layout.segments[its.segment]

        def matrix(buffers: Buffers) -> Tensor:
            return shaped(buffers.stretch(its.segment, segment.length), segment).view(its.shape)

        scalars, optional = self.row_numbers[number]
        old = {name: matrix(self.state[name]) for name in self.rule.fields(optional)}
        rows = {name: field[its.rows] for name, field in old.items()}
        p, state = self.rule.update_rows(matrix(self.source)[its.rows], its.values, rows, scalars)
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


def calls_of(decision: Decision, gradients: Buffers, source: Buffers, target: Buffers, state: State) -> list[Call]:
    """Return the kernel calls of a step: one for each run that has elements."""
    calls = []
    for run, (scalars, optional) in zip(decision.cut.runs, decision.runs, strict=True):
        if run.length:
            first, length = run.members[0], run.length
            p = source.stretch(first, length)
            g = gradients.stretch(first, length)
            if g.device != p.device:
                g = g.to(p.device)
            out = p if target is source else target.stretch(first, length)
            calls.append(Call(p, g, state.stretches(first, length, optional), out, scalars))
    return calls
