"""The decision of a step over the store's memory, before anything is written.

    planner    cuts the step into runs and says with which numbers              runs.py
    calls      what a kernel does with each of them                             calls.py
    step       all of it, and how far it has come                               step.py

Every error of a step is found here. Memory is allocated here, too: a step that finds none has not begun.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import final

import torch
from torch import Tensor

from farstep.errors import InvalidOption, TensorMismatch
from farstep.protocol.hyper import Hyper
from farstep.protocol.memory import TORCH_DTYPES
from farstep_service.kernels.kernel import Kernel, KernelSource
from farstep_service.layout import Layout
from farstep_service.optimizers.rule import AnyRule, KernelName, KernelSignature, RowRule, SegmentCounters
from farstep_service.store.calls import Caller, RowCall, check_numbers
from farstep_service.store.gradients import Gradients, Rows, coalesce
from farstep_service.store.optimizer_state import OptimizerState
from farstep_service.store.runs import Decision, Numbers, Planner, next_step
from farstep_service.store.step import Step, VersionRecord
from farstep_service.store.versions import Versions

WORTH_A_KERNEL = 2**18
"""Elements of a run from which a kernel that avoids a separate pass, for widening or copying, is worth building."""


@final
class Decider:
    """Decide the steps of one optimizer over one layout.

    Args:
        layout: the segments.
        rule: the optimizer.
        kernels: the source of kernels.
        device: the device of state and parameters.
    """

    def __init__(self, layout: Layout, rule: AnyRule, kernels: KernelSource, device: torch.device) -> None:
        self._layout = layout
        self._rule = rule
        self._kernels = kernels
        self._device = device
        self._planner = Planner(layout, rule)

    def forget(self) -> None:
        """Forget how the last step was cut, because counts have been replaced."""
        self._planner.forget()

    def prepare(self, groups: Sequence[Hyper]) -> None:
        """Have kernels prepared for the layout's dtypes."""
        kinds = {(segment.buffer, segment.group) for segment in self._layout.segments}
        forms = {KernelSignature(dtype, self._rule.optional(groups[group])) for dtype, group in kinds}
        self._kernels.prepare(self._rule, sorted(forms), self._device)

    def check_groups(self, groups: Sequence[Hyper]) -> None:
        """Refuse too few options, or those of another optimizer."""
        others = set(map(type, groups)) - {self._rule.hyper}
        if len(groups) < self._layout.groups or any(not issubclass(kind, self._rule.hyper) for kind in others):
            raise InvalidOption(
                f"{self._rule.name} needs its options for each of {self._layout.groups} groups.", field="groups"
            )

    def check_step(
        self, groups: Sequence[Hyper], changed: Container[int], counts: Sequence[SegmentCounters | None]
    ) -> None:
        """Refuse options of changed groups with which their next step would fail.

        Raises:
            InvalidOption: naming what stands in the way.
        """
        seen: set[tuple[int, str, int]] = set()
        for segment, its in zip(self._layout.segments, counts, strict=True):
            key = segment.group, segment.buffer, id(its)  # neighbours share the record of their counts
            if segment.group in changed and key not in seen:
                seen.add(key)
                _check_one(self._rule, segment.buffer, its, groups[segment.group])

    def decide(
        self,
        groups: Sequence[Hyper],
        gradients: Gradients,
        versions: Versions,
        state: OptimizerState,
        now: VersionRecord,
        wanted: KernelName | None,
    ) -> tuple[Step, Kernel]:
        """Decide everything about a step; no visible memory is written.

        Args:
            groups: options of each param group.
            gradients: of the step.
            versions, state, now: the store's.
            wanted: the kernel to run, None for the best one available.

        Raises:
            FarstepError: the step is refused.
        """
        self.check_groups(groups)
        if gradients.buffers.layout is not self._layout and gradients.buffers.layout != self._layout:
            raise TensorMismatch("The gradients are not in the session's layout.", field="gradients")
        source, target = versions.current, versions.target()
        decision = self._planner.decide(groups, gradients, now.counts, source.borders)
        self._rule.check_gradients(self._layout, groups, decision.cut.dense, gradients.sparse)
        rows, spread = self._sparse(groups, gradients, decision) if gradients.sparse else ([], [])
        written = [*decision.cut.dense, *[its.segment for its, _ in spread]]
        runs = [(run.members[0], run.length, its) for run, its in zip(decision.cut.runs, decision.runs, strict=True)]
        segments = self._layout.segments
        runs += [(its.segment, segments[its.segment].length, numbers) for its, numbers in spread]
        forms = frozenset(
            [KernelSignature(segments[first].buffer, its.optional) for first, length, its in runs if length]
        )
        chosen = self._kernels.choose(self._rule, forms, self._device, wanted)
        if self._rule.optional_fields:
            state.take_memory([name for numbers in (*decision.runs, *decision.rows) for name in numbers.optional])
        gradients.buffers.begin(decision.cut.dense)
        source.begin(decision.cut.touched)
        caller = Caller(self._rule, source, target.buffers, state)
        copies = self._copies(decision, gradients, chosen)
        calls = caller.dense(decision, gradients.buffers, copies)
        if spread:
            calls += caller.spread(spread)
        check_numbers([(call.p.dtype, call.scalars) for call in calls])
        if rows:
            check_numbers([(each.rows.values.dtype, each.numbers.scalars) for each in rows])
        version = now.version + 1
        step = Step(
            source=source,
            target=target,
            state=state,
            gradients=gradients,
            touched=decision.cut.touched,
            stale=[] if target.buffers is source else now.stale(target.version, written),
            calls=calls,
            rows=rows,
            after=VersionRecord(version, decision.after, now.marked(decision.cut.touched, version)),
            doubled=frozenset(
                [
                    member
                    for run, copy in zip(decision.cut.runs, copies, strict=True)
                    if copy is not None
                    for member in run.members
                ]
            ),
        )
        return step, chosen

    def _copies(self, decision: Decision, gradients: Gradients, kernel: Kernel) -> list[Tensor | None]:
        """Return for each run a second target of its new parameters, if its kernel can write it.

        Kernels for gradients in 16 bits, and for copies, are requested for large enough runs.
        """
        segments, source, into = self._layout.segments, gradients.buffers, gradients.copy
        if into is not None and not into.borders <= source.borders:
            into = None
        copies: list[Tensor | None] = []
        wanted: set[KernelSignature] = set()
        for run, its in zip(decision.cut.runs, decision.runs, strict=True):
            first, dtype = run.members[0], segments[run.members[0]].buffer
            gradient = source.element(first) if source.element(first) != dtype else ""
            form = KernelSignature(dtype, its.optional, gradient, "" if into is None else into.element(first))
            if (form.gradient or form.copy) and run.length >= WORTH_A_KERNEL:
                wanted.add(form)
            copied = into is not None and form.copy and run.length and kernel.takes(form)
            copies.append(into.stretch(first, run.length) if into is not None and copied else None)
        if wanted:
            self._kernels.improve(self._rule, wanted, self._device)
        return copies

    def _sparse(
        self, groups: Sequence[Hyper], gradients: Gradients, decision: Decision
    ) -> tuple[list[RowCall], list[tuple[Rows, Numbers]]]:
        """Return the sparse gradients of which only the rows change, and those to make dense."""
        rows, spread = [], []
        for (index, (indices, values)), numbers in zip(gradients.sparse.items(), decision.rows, strict=True):
            segment = self._layout.segments[index]
            its = coalesce(index, segment, indices, values, self._device)
            if isinstance(self._rule, RowRule) and self._rule.by_rows(groups[segment.group]):
                rows.append(RowCall(self._rule, its, numbers))
            else:
                spread.append((its, numbers))
        return rows, spread


def check_first_step(layout: Layout, rule: AnyRule, groups: Sequence[Hyper], beginning: int = 0) -> None:
    """Refuse options with which the first step of a session, or of added groups, would fail.

    Args:
        layout: the segments.
        rule: the optimizer.
        groups: options of each param group.
        beginning: the first group to check.

    Raises:
        InvalidOption: naming what stands in the way.
    """
    for group, buffer in sorted({(each.group, each.buffer) for each in layout.segments}):
        if group >= beginning:
            _check_one(rule, buffer, None, groups[group])


def _check_one(rule: AnyRule, buffer: str, counts: SegmentCounters | None, hyper: Hyper) -> None:
    check_numbers([(TORCH_DTYPES[buffer], next_step(rule, counts, hyper)[0])])
