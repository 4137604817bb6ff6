"""A step in progress: its decision, made before anything is written, and its progress.

    begin      copies unchanged segments into the new version's memory      (only if the old one is held)
    calls      one per run, on dense gradients, and one per sparse gradient that was made dense
    rows       one per sparse gradient whose rows alone change
    end        brings results to where their owner finds them               (only memory of the user)

Each part can be stopped anywhere, by a failing kernel or a keyboard interrupt, and continued: nothing is done twice
except plain copies, which are idempotent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from farstep.protocol.receipt import Ran
from farstep_service.kernels.kernel import Call, Kernel, Position, Progress, Write, cut
from farstep_service.optimizers.rule import SegmentCounters
from farstep_service.store.buffers import Buffers, FlatBuffers, shaped
from farstep_service.store.calls import RowCall
from farstep_service.store.gradients import Gradients
from farstep_service.store.optimizer_state import OptimizerState
from farstep_service.store.versions import VersionMemory


@dataclass(frozen=True, slots=True)
class Applied:
    """A step that is complete.

    Attributes:
        version: the version it made.
        kernel: the kernel that ran it; replay with the same kernel gives the same bits.
        runs: the number of its kernel calls.
        again: it is part of a larger step, which continues with another evaluation of the objective.
        copied: the segments that were also written to `Gradients.copy`.
        switched: of a mixed step, where the reference kernel continued; see `Rerun`.
    """

    version: int
    kernel: Ran
    runs: int
    again: bool = False
    copied: frozenset[int] = frozenset()
    switched: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """The record of a version, without its tensors.

    Attributes:
        version: its number.
        counts: of each segment; None without state.
        changed: for each segment the version that last changed its parameter.
    """

    version: int
    counts: Sequence[SegmentCounters | None]
    changed: Sequence[int]

    def marked(self, segments: Sequence[int], version: int) -> list[int]:
        """Return the version that last changed each segment, after a version that changes these."""
        changed = list(self.changed)
        for index in segments:
            changed[index] = version
        return changed

    def stale(self, since: int, written: Sequence[int]) -> list[int]:
        """Return the segments that changed since a version, except those about to be written."""
        skipped = set(written)
        return [index for index, last in enumerate(self.changed) if last > since and index not in skipped]


@final
@dataclass(slots=True)
class Step:
    """A step that has been decided.

    Attributes:
        source, target: parameters before and after; the same memory if no reader holds the version before.
        state: the optimizer state.
        gradients: its gradients, which must not change until the step is complete.
        touched: the segments it changes.
        stale: the segments to copy from source to target first.
        calls, rows: what it does.
        after: the contents it makes.
        doubled: the segments that its calls also write to `Gradients.copy`.
    """

    source: Buffers
    target: VersionMemory
    state: OptimizerState
    gradients: Gradients
    touched: list[int]
    stale: list[int]
    calls: list[Call]
    rows: list[RowCall]
    after: VersionRecord
    doubled: frozenset[int] = frozenset()
    progress: Progress = field(default_factory=Progress)
    row_progress: Progress = field(default_factory=Progress)
    copied: bool = False
    kernels: list[str] = field(default_factory=list)
    switched: tuple[int, int] = (0, 0)

    def begin(self, kernel: Kernel, switched: tuple[int, int]) -> None:
        """Run a kernel up to the point where another one continued when the step was first taken."""
        call, element = switched
        self._copy_unchanged()
        kernel.execute([*self.calls[:call], *([cut(self.calls[call], 0, element)] if element else [])], Progress())
        self.progress.at, self.switched = Position(call, element), switched
        self.kernels.append(kernel.name)

    def _copy_unchanged(self) -> None:
        if not self.copied:
            if self.stale and isinstance(self.target.buffers, FlatBuffers):
                self.target.buffers.copy_(self.source, self.stale)
            self.copied = True

    def carry_out(self, kernel: Kernel) -> Applied:
        """Do the rest of the step.

        Raises:
            Exception: the kernel's own; the step can be continued.
        """
        self._copy_unchanged()
        before = self.progress.at
        try:
            kernel.execute(self.calls, self.progress)
        finally:
            if self.progress.at is not before:
                at = self.progress.at
                self.kernels.append(kernel.name)
                if kernel.name == "fused":
                    self.switched = at.then if at.writes else (at.call, at.element)
        self.row_progress.resume()
        while (number := self.row_progress.at.call) < len(self.rows):
            self.row_progress.commit(self._writes(number), call=number + 1)
        self.target.buffers.end(self.touched)
        ran: Ran = "reference"
        if "fused" in self.kernels:
            alone = len(set(self.kernels)) == 1 or self.switched == (len(self.calls), 0)
            ran = "fused" if alone else "mixed"
        return Applied(
            self.after.version,
            ran,
            len(self.calls) + len(self.rows),
            copied=self.doubled,
            switched=self.switched if ran == "mixed" else (0, 0),
        )

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
