"""The kernel calls of a step: their stretches of memory and their numbers.

dense      one call per run of segments with a dense gradient
spread     one per sparse gradient that is made dense
rows       no kernel call: a sparse gradient whose rows alone change
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from farstep.errors import InvalidOption
from farstep_service.kernels.kernel import Call
from farstep_service.optimizers.rule import AnyRule, ElementwiseRule, RowRule
from farstep_service.store.buffers import Buffers, flattened, shaped
from farstep_service.store.gradients import Rows
from farstep_service.store.optimizer_state import OptimizerState
from farstep_service.store.runs import Decision, Numbers


class RowCall(NamedTuple):
    """A step on the rows of one sparse gradient."""

    rule: RowRule[Any]
    rows: Rows
    numbers: Numbers


def check_numbers(steps: Iterable[tuple[torch.dtype, tuple[float, ...]]]) -> None:
    """Refuse a step whose numbers its dtype cannot hold, which torch's operations would refuse midway.

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
        state: the optimizer state, with memory for every field in use.
    """

    def __init__(self, rule: AnyRule, source: Buffers, target: Buffers, state: OptimizerState) -> None:
        self._rule = rule
        self._source = source
        self._target = target
        self._state = state

    def dense(self, decision: Decision, gradients: Buffers, copies: Sequence[Tensor | None]) -> list[Call]:
        """Return one call for each run that has elements.

        Args:
            decision: of the step.
            gradients: the dense ones.
            copies: for each run a second target of its new parameters.
        """
        runs = zip(decision.cut.runs, decision.runs, copies, strict=True)
        return [
            self._call(run.members[0], run.length, gradients.stretch(run.members[0], run.length), numbers, copy)
            for run, numbers, copy in runs
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

    def _call(self, first: int, length: int, g: Tensor, numbers: Numbers, copy: Tensor | None = None) -> Call:
        p = self._source.stretch(first, length)
        if g.device != p.device:
            g = g.to(p.device)
        out = p if self._target is self._source else self._target.stretch(first, length)
        scalars, optional = numbers
        segment = self._source.layout.segments[first]
        if isinstance(self._rule, ElementwiseRule):
            pairs = self._rule.complex_numbers and segment.is_complex
            return Call(p, g, self._state.stretches(first, length, optional), out, scalars, copy, pairs)
        p, g, out = (shaped(each, segment) for each in (p, g, out))
        copy = None if copy is None else shaped(copy, segment)
        return Call(p, g, self._state.tensors(first, optional), out, scalars, copy)
