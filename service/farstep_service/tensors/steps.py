"""From the gradients of a round to a step, by the session's policies (`farstep.protocol.policies`).

    a round ──► accumulated? ──► finite? ──► each policy ──► the step
                  │ not enough     │ no
                  ▼                ▼
                Left             Left, or NonFinite

What a policy does is its own; here is when. If the first one finds NaN and Inf on its way, nothing else looks for them.

A round that makes no step leaves parameters, state and step counts as they are; options that came with it hold. One
that fails leaves the rounds before it as they were, so that it may be tried again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from farstep.errors import NonFinite
from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import Evaluation
from farstep.protocol.policies import Facts
from farstep.protocol.receipt import Reason
from farstep_service.kernels.kernel import Rerun
from farstep_service.plan import Plan
from farstep_service.store import Applied, Gradients
from farstep_service.tensors.finite import first_nonfinite_in
from farstep_service.tensors.policies import Accumulated, Workspace, through
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
        facts: what policies say of them.
    """

    applied: Applied
    workers: tuple[str, ...]
    facts: Facts = ()


@dataclass(frozen=True, slots=True)
class _Round:
    """What is known of a step before it is taken."""

    workers: tuple[str, ...]
    facts: Facts


class _NoStep(Exception):  # no error: how a check leaves the policies
    """There is no step of these gradients, and why."""

    def __init__(self, left: Left) -> None:
        super().__init__(left.detail)
        self.left = left


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
    def takes_half_precision(self) -> bool:
        """Return whether gradients in 16 bits may stay so: the state takes them, and no policy changes them."""
        return self._state.takes_half_precision and self.plan.policies.as_they_come

    @property
    def nbytes(self) -> int:
        """Return the memory of rounds that wait and of changed gradients."""
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
        state, rounds = self._state, self.plan.policies.rounds
        with torch.no_grad():
            if self._accumulated.count + 1 < rounds:
                return self._accumulate(gradients, workers, changed, checked=checked)
            made_by = (*self._accumulated.workers, *workers)
            if self._accumulated.count:
                gradients, checked = self._accumulated.mean_with(gradients, self._workspace), False
            try:
                gradients, facts = self._through_policies(gradients, checked=checked)
            except _NoStep as no:
                self._leave(changed, no.left)
                self._accumulated.clear_()
                return no.left
        before = state.version
        try:
            applied = state.step(gradients, changed, evaluation, lr_factor, passing=passing, rerun=rerun)
        finally:
            if state.pending:
                self._unfinished = _Round(made_by, facts)
            if state.pending or state.version != before:
                self._accumulated.clear_()
        return Taken(applied, made_by, facts)

    def finish(self) -> Taken | None:
        """Complete a step that failed midway; return None if there was none."""
        applied, unfinished = self._state.finish(), self._unfinished
        if applied is None:
            return None
        self._unfinished = None
        assert unfinished is not None
        return Taken(applied, unfinished.workers, unfinished.facts)

    def _accumulate(
        self, gradients: Gradients, workers: Sequence[str], changed: Mapping[int, Hyper], *, checked: bool
    ) -> Left:
        """Add a round that waits for others to their sum."""
        if not checked:
            try:
                self._check_finite(gradients)
            except _NoStep as no:
                return self._leave(changed, no.left)
        self._state.check_step(changed)
        self._accumulated.add_(gradients, workers)
        return self._leave(
            changed, Left("accumulated", f"Round {self._accumulated.count} of {self.plan.policies.rounds}.")
        )

    def _leave(self, changed: Mapping[int, Hyper], left: Left) -> Left:
        self._state.set_groups(changed)
        return left

    def _through_policies(self, gradients: Gradients, *, checked: bool) -> tuple[Gradients, Facts]:
        """Return the gradients of a step, and what policies say of them.

        Raises:
            NonFinite, _NoStep: see `_check_finite`.
        """
        policies = self.plan.policies.changing
        if not checked and not (policies and policies[0].finds_nonfinite):
            self._check_finite(gradients)
            checked = True
        if not policies:
            return gradients, ()
        return through(policies, gradients, self._workspace, _finite if checked else self._check_finite)

    def _check_finite(self, gradients: Gradients) -> None:
        """Look whether a sum of gradients may make a step.

        Raises:
            NonFinite: the session refuses it.
            _NoStep: the session skips it.
        """
        plan = self.plan
        if plan.nonfinite == "allow" or (index := first_nonfinite_in(gradients)) is None:
            return
        name = plan.layout.segments[index].name
        what = f"The sum of the gradients of {name!r} holds NaN or Inf, though each of them is finite"
        if plan.nonfinite == "skip":
            raise _NoStep(Left("nonfinite", f"{what}."))
        raise NonFinite(
            f"{what}; nothing was applied.",
            remedy="Lower the loss scale, or the gradients' size; nonfinite='skip' would skip such steps.",
            field=name,
        )


def _finite(gradients: Gradients) -> None:
    """Take gradients that were looked at as they are, though their norm may be beyond the largest number."""
