"""From the gradients of a round to a step, by the session's policy (`farstep.protocol.policy`).

    a round ──► accumulated? ──► finite? ──► clipped ──► the step
                  │ not enough     │ no
                  ▼                ▼
                Left             Left, or NonFinite

A round that makes no step leaves parameters, state and step counts as they are; options that came with it hold. One
that fails leaves the rounds before it as they were, so that it may be tried again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from farstep.errors import NonFinite
from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import Evaluation
from farstep.protocol.receipt import Reason
from farstep_service.kernels.kernel import Rerun
from farstep_service.plan import Plan
from farstep_service.store import Applied, Gradients
from farstep_service.tensors.policies import (
    Accumulated,
    Workspace,
    clipped_by_norm,
    clipped_by_value,
    coalesced,
    first_nonfinite_in,
    norm_of,
)
from farstep_service.tensors.state import NO_GROUPS, SessionState


@dataclass(frozen=True, slots=True)
class Left:
    """A round that made no step, and why."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that was taken.

    Attributes:
        applied: what the state says of it.
        workers: whose gradients made it, in the order of the sums.
        grad_norm: their norm before they were clipped, where they are clipped by it.
    """

    applied: Applied
    workers: tuple[str, ...]
    grad_norm: float | None


@dataclass(frozen=True, slots=True)
class _Round:
    """What is known of a step before it is taken."""

    workers: tuple[str, ...]
    grad_norm: float | None


@final
class Steps:
    """Turn rounds into steps of a state, whose plan says how."""

    def __init__(self, state: SessionState, accumulated: Accumulated | None = None) -> None:
        self._state = state
        self._accumulated = accumulated or Accumulated()
        self._workspace = Workspace()
        self._unfinished: _Round | None = None

    @property
    def plan(self) -> Plan:
        """Return the state's plan."""
        return self._state.plan

    @property
    def accumulated(self) -> Accumulated:
        """Return the rounds that wait for others."""
        return self._accumulated

    @property
    def narrow(self) -> bool:
        """Return whether gradients in 16 bits may stay so: the state takes them, and no policy changes them."""
        return self._state.narrow and self.plan.policy.as_they_come

    @property
    def nbytes(self) -> int:
        """Return the memory of rounds that wait and of clipped gradients."""
        return self._accumulated.nbytes + self._workspace.nbytes

    def take(
        self,
        gradients: Gradients,
        workers: Sequence[str],
        changed: Mapping[int, Hyper],
        evaluation: Evaluation | None = None,
        lr_factor: float = 1.0,
        *,
        passing: Mapping[int, Hyper] = NO_GROUPS,
        checked: bool,
        rerun: Rerun | None = None,
    ) -> Taken | Left:
        """Take a round in, and the step that it makes; for the other arguments see `SessionState.step`.

        Args:
            workers: whose gradients these are, in the order of their sum.
            checked: they are known to be finite, where the session asks for that.

        Raises:
            NonFinite: a sum of finite gradients is not finite, in a session that refuses such.
            FarstepError: the step is refused. Nothing has changed then.
            StepInterrupted: a kernel failed midway; the step is pending.
        """
        state, rounds = self._state, self.plan.policy.accumulate
        with torch.no_grad():
            if self._accumulated.count + 1 < rounds:
                if not checked and (left := self._nonfinite(gradients)):
                    return self._leave(changed, left)
                state.check_step(changed)
                self._accumulated.add_(gradients, workers)
                return self._leave(changed, Left("accumulated", f"Round {self._accumulated.count} of {rounds}."))
            made_by = (*self._accumulated.workers, *workers)
            if self._accumulated.count:
                gradients, checked = self._accumulated.mean_with(gradients, self._workspace), False
            clipped = self._clipped(gradients, checked=checked)
            if isinstance(clipped, Left):
                self._leave(changed, clipped)
                self._accumulated.clear_()
                return clipped
            gradients, norm = clipped
        before = state.version
        try:
            applied = state.step(gradients, changed, evaluation, lr_factor, passing=passing, rerun=rerun)
        finally:
            if state.pending:
                self._unfinished = _Round(made_by, norm)
            if state.pending or state.version != before:
                self._accumulated.clear_()
        return Taken(applied, made_by, norm)

    def finish(self) -> Taken | None:
        """Complete a step that failed midway; return None if there was none."""
        applied, unfinished = self._state.finish(), self._unfinished
        if applied is None:
            return None
        self._unfinished = None
        assert unfinished is not None
        return Taken(applied, unfinished.workers, unfinished.grad_norm)

    def _leave(self, changed: Mapping[int, Hyper], left: Left) -> Left:
        self._state.set_groups(changed)
        return left

    def _clipped(self, gradients: Gradients, *, checked: bool) -> tuple[Gradients, float | None] | Left:
        """Return the gradients of a step and their norm, or why there is no step.

        A norm that is finite tells that every gradient is, so that none has to be looked at for it.
        """
        policy, norm = self.plan.policy, None
        if not checked and (policy.clip_norm is None or policy.clip_value is not None):
            if left := self._nonfinite(gradients):
                return left
            checked = True
        if policy.clip_value is not None:
            gradients = clipped_by_value(coalesced(gradients), policy.clip_value, self._workspace)
        if policy.clip_norm is not None:
            gradients = coalesced(gradients)
            norm = norm_of(gradients, policy.clip_norm_type)
            if not checked and not math.isfinite(norm.item()) and (left := self._nonfinite(gradients)):
                return left
            gradients = clipped_by_norm(gradients, norm, policy.clip_norm, self._workspace)
        return gradients, None if norm is None else norm.item()

    def _nonfinite(self, gradients: Gradients) -> Left | None:
        """Say why a sum of gradients makes no step, None if it may.

        Raises:
            NonFinite: the session refuses it.
        """
        plan = self.plan
        if plan.nonfinite == "allow" or (index := first_nonfinite_in(gradients)) is None:
            return None
        name = plan.layout.segments[index].name
        what = f"The sum of the gradients of {name!r} holds NaN or Inf, though each of them is finite"
        if plan.nonfinite == "skip":
            return Left("nonfinite", f"{what}.")
        raise NonFinite(
            f"{what}; nothing was applied.",
            remedy="Lower the loss scale, or the gradients' size; nonfinite='skip' would skip such steps.",
            field=name,
        )
