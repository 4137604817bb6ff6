"""From the gradients of a round to a step, by the session's policies (`farstep.protocol.policies`).

    a round ──► accumulated? ──► finite? ──► each policy ──► the step
                  │ not enough     │ no
                  ▼                ▼
                NoStep           NoStep, or NonFinite

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
from farstep_service.coordinator import NoStep, StepTaken
from farstep_service.kernels.kernel import Rerun
from farstep_service.plan import Plan
from farstep_service.store import Applied, Gradients
from farstep_service.tensors.finite import first_nonfinite_in
from farstep_service.tensors.policies import Accumulated, Workspace, through
from farstep_service.tensors.state import NO_GROUPS, SessionState


@dataclass(frozen=True, slots=True)
class _Round:
    """What is known of a step before it is taken."""

    workers: tuple[str, ...]
    facts: Facts


class _Skipped(Exception):  # no error: how a check leaves the policies
    """There is no step of these gradients, as a sentence."""


@final
class Steps:
    """Turn rounds into steps of a state, whose plan says how.

    Attributes:
        copied: the segments that the last step wrote to `Gradients.copy`, too.
    """

    def __init__(self, state: SessionState, accumulated: Accumulated | None = None) -> None:
        self._state = state
        self._accumulated = accumulated or Accumulated()
        self._workspace = Workspace()
        self._unfinished: _Round | None = None
        self.copied: frozenset[int] = frozenset()

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
        disagreement: str = "",
        rerun: Rerun | None = None,
    ) -> StepTaken | NoStep:
        """Take a round in, and the step that it makes; for the other arguments see `SessionState.step`.

        Args:
            workers: whose gradients these are, in the order of their sum.
            checked: they are known to be finite, where the session asks for that.
            disagreement: where the workers named different options; see `StepTaken`.

        Raises:
            NonFinite: a sum of finite gradients is not finite, in a session that refuses such.
            FarstepError: the step is refused. Nothing has changed then.
            StepInterrupted: a kernel failed midway; the step is pending.
        """
        state, rounds = self._state, self._accumulated
        made_by: tuple[str, ...] = tuple(workers)
        facts: Facts = ()
        if not checked or rounds.count or not state.plan.policies.as_they_come:
            with torch.no_grad():
                try:
                    if rounds.count + 1 < state.plan.policies.rounds:
                        return self._accumulate(gradients, made_by, changed, disagreement, checked=checked)
                    if rounds.count:
                        gradients, checked = rounds.mean_with(gradients, self._workspace), False
                    gradients, facts = self._through_policies(gradients, checked=checked)
                except _Skipped as skipped:
                    state.set_groups(changed)
                    if rounds.count + 1 >= state.plan.policies.rounds:
                        rounds.clear_()
                    return NoStep("nonfinite", str(skipped), disagreement, made_by)
            made_by = (*rounds.workers, *made_by)
        before = state.version
        try:
            applied = state.step(gradients, changed, evaluation, lr_factor, passing=passing, rerun=rerun)
        except BaseException:
            if state.pending:
                self._unfinished = _Round(made_by, facts)
            if state.pending or state.version != before:
                rounds.clear_()
            raise
        if rounds.count:
            rounds.clear_()
        return self._taken(applied, made_by, facts, disagreement)

    def finish(self, disagreement: str = "") -> StepTaken | None:
        """Complete a step that failed midway; return None if there was none."""
        applied, unfinished = self._state.finish(), self._unfinished
        if applied is None:
            return None
        self._unfinished = None
        assert unfinished is not None
        return self._taken(applied, unfinished.workers, unfinished.facts, disagreement)

    def _taken(self, applied: Applied, workers: tuple[str, ...], facts: Facts, disagreement: str) -> StepTaken:
        self.copied = applied.copied
        return StepTaken(applied.version, workers, applied.kernel, applied.again, facts, disagreement, applied.switched)

    def _accumulate(
        self,
        gradients: Gradients,
        workers: tuple[str, ...],
        changed: Mapping[int, Hyper],
        disagreement: str,
        *,
        checked: bool,
    ) -> NoStep:
        """Add a round that waits for others to their sum."""
        if not checked:
            self._check_finite(gradients)
        self._state.check_step(changed)
        self._accumulated.add_(gradients, workers)
        self._state.set_groups(changed)
        round_of = f"Round {self._accumulated.count} of {self.plan.policies.rounds}."
        return NoStep("accumulated", round_of, disagreement, workers)

    def _through_policies(self, gradients: Gradients, *, checked: bool) -> tuple[Gradients, Facts]:
        """Return the gradients of a step, and what policies say of them.

        Raises:
            NonFinite, _Skipped: see `_check_finite`.
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
            _Skipped: the session skips it.
        """
        plan = self.plan
        if plan.nonfinite == "allow" or (index := first_nonfinite_in(gradients)) is None:
            return
        name = plan.layout.segments[index].name
        what = f"The sum of the gradients of {name!r} holds NaN or Inf, though each of them is finite"
        if plan.nonfinite == "skip":
            raise _Skipped(f"{what}.")
        raise NonFinite(
            f"{what}; nothing was applied.",
            remedy="Lower the loss scale, or the gradients' size; nonfinite='skip' would skip such steps.",
            field=name,
        )


def _finite(gradients: Gradients) -> None:
    """Take gradients that were looked at as they are, though their norm may be beyond the largest number."""
