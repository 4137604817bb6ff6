"""The gradients of a step as policies see them, and the memory that what they change goes into.

What is changed is written into memory of ours: the gradients' own if that is ours, else memory that is kept for it,
since a user's gradients are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from farstep.protocol import policies
from farstep_service.store import FlatBuffers, Gradients, pieces


@final
class Workspace:
    """Where gradients go that must not be changed where they are: memory that is taken once, when it is needed."""

    def __init__(self) -> None:
        self._buffers: FlatBuffers | None = None

    @property
    def nbytes(self) -> int:
        """Return the memory taken."""
        return self._buffers.nbytes if self._buffers else 0

    def instead_of(self, gradients: Gradients) -> FlatBuffers:
        """Return where results go: the gradients' own memory if it is ours, else some of the same layout."""
        own = gradients.buffers
        if isinstance(own, FlatBuffers) and not gradients.borrowed:
            return own
        if self._buffers is None or self._buffers.layout is not own.layout:
            self._buffers = FlatBuffers(own.layout, own.device, zero=False)
        return self._buffers


@final
class StepGradients(policies.Gradients):
    """The gradients of a step on their way through the policies.

    Args:
        gradients: as they are by now; of sparse ones no row is named twice.
        workspace: memory for those that are not ours.
        check: leaves the step if any of them is not finite.
    """

    def __init__(self, gradients: Gradients, workspace: Workspace, check: Callable[[Gradients], None]) -> None:
        self.gradients = gradients
        self._workspace = workspace
        self._check = check

    def tensors(self) -> Sequence[Tensor]:
        own = self.gradients
        return [
            *(own.buffers.segment(index) for index in own.dense()),
            *(values for _, values in own.sparse.values()),
        ]

    def mapped(self, change: Callable[[Tensor, Tensor], object]) -> StepGradients:
        own, into = self.gradients, self._workspace.instead_of(self.gradients)
        for source, target in pieces(into.layout, own.dense(), own.buffers, into):
            change(source, target)
        sparse = {}
        for index, (rows, values) in own.sparse.items():
            sparse[index] = (rows, torch.empty_like(values))
            change(values, sparse[index][1])
        changed = replace(own, buffers=into, sparse=sparse, borrowed=False)
        return StepGradients(changed, self._workspace, self._check)

    def check_finite(self) -> None:
        self._check(self.gradients)


def through(
    asked: Sequence[policies.Policy], gradients: Gradients, workspace: Workspace, check: Callable[[Gradients], None]
) -> tuple[Gradients, policies.Facts]:
    """Return what the gradients of a step are after its policies, and what those have said of them.

    Args:
        asked: the policies, in their order.
        gradients: those of the step, which are not changed if they are borrowed.
        workspace: memory for those that are not ours.
        check: leaves the step if gradients are not finite.
    """
    given: policies.Gradients = StepGradients(coalesced(gradients), workspace, check)
    facts: policies.Facts = ()
    for policy in asked:
        given, said = policy(given)
        facts += said
    assert isinstance(given, StepGradients)
    return given.gradients, facts


def coalesced(gradients: Gradients) -> Gradients:
    """Return gradients of whose sparse ones no row is named twice."""
    found = {}
    for index, (indices, values) in gradients.sparse.items():
        shape = gradients.buffers.layout.segments[index].shape
        whole = torch.sparse_coo_tensor(indices, values, shape, device=values.device, check_invariants=False).coalesce()
        found[index] = (whole.indices(), whole.values())
    return replace(gradients, sparse=found) if found else gradients
