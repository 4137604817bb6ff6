"""The pushes of one session that wait, and the steps that they become.

    offer      a push comes in; aggregation says whether it completes a step, completes a skip, or waits
    withdraw   the push of a worker that is shut out is taken back
    tick       a barrier whose deadline has passed is given up
    finish     a step whose kernel failed midway is completed, before anything else happens

Whoever offers a push has checked it. Each of the four returns what it decided, for every push that it decided about.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from farstep.errors import BarrierTimeout, FarstepError, InternalError
from farstep.hyper import Hyper
from farstep.messages import PushHead, Receipt, WriteName
from farstep_service.aggregation import Abort, Aggregation, Ledger, Members, Skip, Step, mismatch
from farstep_service.gradients import Contribution, Copied, mean_evaluation, reduce_
from farstep_service.session.outcomes import Outcome, Outcomes, told
from farstep_service.session.state import SessionState
from farstep_service.session.steps import Left, Steps, Taken


@dataclass(slots=True)
class _Waiting:
    head: PushHead
    fingerprint: str
    contribution: Contribution
    nonfinite: str


@dataclass(slots=True)
class _Unfinished:
    """A step whose kernel failed midway: what has to be recorded when the store has finished it."""

    pushes: list[_Waiting]
    step: Step


@final
class Pushes:
    """Hold the pushes that wait, at most one of a worker, and take the steps that they complete.

    Args:
        state: what the steps change.
        aggregation: decides when there is a step.
        members: who takes part.
        ledger: where receipts are kept.
    """

    def __init__(self, state: SessionState, aggregation: Aggregation, members: Members, ledger: Ledger) -> None:
        self._state = state
        self._steps = Steps(state)
        self._aggregation = aggregation
        self._members = members
        self._ledger = ledger
        self._waiting: dict[str, _Waiting] = {}
        self._unfinished: _Unfinished | None = None

    def __contains__(self, worker: str) -> bool:
        return worker in self._waiting

    @property
    def nbytes(self) -> int:
        """Return the memory of the gradients that wait, for others or for the step they are accumulated for."""
        return sum(each.contribution.nbytes for each in self._waiting.values()) + self._steps.nbytes

    @property
    def deadline(self) -> float | None:
        """Return the time at which `tick` has something to decide."""
        return self._aggregation.deadline

    def holds(self, name: WriteName, fingerprint: str) -> bool:
        """Say whether a push waits already.

        Raises:
            IdempotencyMismatch: its worker has another one waiting.
        """
        earlier = self._waiting.get(name.worker)
        if earlier is not None and earlier.fingerprint != fingerprint:
            raise mismatch(name)
        return earlier is not None

    def offer(
        self, head: PushHead, contribution: Contribution, fingerprint: str, now: float, *, nonfinite: str = ""
    ) -> Outcomes:
        """Add a push; for the other arguments see `Session.push`.

        Args:
            nonfinite: what in its gradients holds NaN or Inf, so that nobody takes the step; "" for nothing.
        """
        self._waiting[head.name.worker] = _Waiting(head, fingerprint, contribution, nonfinite)
        match self._aggregation.offer(head.name.worker, now, skip=head.skip or bool(nonfinite)):
            case None:
                return {}
            case Skip() as skip:
                return self._skip(skip)
            case Step() as step:
                return self._step(step)

    def withdraw(self, worker: str, error: FarstepError) -> Outcomes:
        """Take the push of a worker that waits back, if there is one, and tell it why."""
        waiting = self._waiting.pop(worker, None)
        if waiting is None:
            return {}
        self._aggregation.withdraw(worker)
        return {waiting.head.name: Outcome(error)}

    def tick(self, now: float) -> Outcomes:
        """Give a barrier whose deadline has passed up."""
        abort = self._aggregation.tick(now)
        return self._abort(abort) if abort else {}

    def finish(self) -> Outcomes:
        """Finish an interrupted step, if there is one, before anything else happens."""
        if self._unfinished is None:
            return {}
        taken = self._steps.finish()
        unfinished, self._unfinished = self._unfinished, None
        if taken is None:
            raise InternalError("An interrupted step is recorded, but the store has none.")
        return self._commit(unfinished.pushes, unfinished.step, taken, 0.0)

    def _step(self, step: Step) -> Outcomes:
        pushes = [self._waiting.pop(worker) for worker in step.workers]
        began = time.perf_counter()
        try:
            changed = self._changed(pushes)
            contributions = [push.contribution for push in pushes]
            gradients = reduce_(contributions, step.divisor, self._state.device, narrow=self._steps.narrow)
            began = time.perf_counter()
            evaluation = mean_evaluation([push.head.evaluation for push in pushes], step.divisor)
            taken = self._steps.take(gradients, step.workers, changed, evaluation, checked=len(pushes) == 1)
        except Exception as exc:
            if self._state.pending:
                self._unfinished = _Unfinished(pushes, step)
            error = told(exc, "The step")
            return {push.head.name: Outcome(error) for push in pushes}
        if isinstance(taken, Left):
            return self._leave(pushes, step.divisor, taken, step.workers)
        return self._commit(pushes, step, taken, time.perf_counter() - began)

    def _skip(self, skip: Skip) -> Outcomes:
        """Commit the pushes of a step that is not taken; options they changed hold all the same."""
        pushes = [self._waiting.pop(worker) for worker in skip.workers]
        try:
            self._state.set_groups(self._changed(pushes))
        except FarstepError as error:
            return {push.head.name: Outcome(error) for push in pushes}
        nonfinite = next((push.nonfinite for push in pushes if push.nonfinite), "")
        return self._leave(pushes, skip.divisor, Left("nonfinite" if nonfinite else "skipped", nonfinite))

    def _leave(
        self, pushes: Sequence[_Waiting], divisor: int, left: Left, contributors: tuple[str, ...] = ()
    ) -> Outcomes:
        """Commit pushes that left everything as it is."""
        outcomes: Outcomes = {}
        for push in pushes:
            version, base = self._state.version, push.head.base
            receipt = Receipt(
                version,
                base,
                staleness=version - base,
                applied=False,
                contributors=contributors,
                divisor=divisor,
                reason=left.reason,
                detail=left.detail,
            )
            self._ledger.commit(push.head.name, push.fingerprint, receipt)
            outcomes[push.head.name] = Outcome(receipt)
        return outcomes

    def _changed(self, pushes: Sequence[_Waiting]) -> dict[int, Hyper]:
        """Return the groups that the options of several pushes lead to; of two values the later worker's counts.

        Raises:
            InvalidOption: options that are right by themselves and wrong together.
        """
        merged: dict[int, dict[str, Any]] = {}
        for push in pushes:
            for index, options in push.head.groups.items():
                merged.setdefault(index, {}).update(options)
        return self._state.changed(merged)

    def _commit(self, pushes: list[_Waiting], step: Step, taken: Taken, kernel_s: float) -> Outcomes:
        outcomes: Outcomes = {}
        applied = taken.applied
        for push in pushes:
            if applied.copied:
                push.contribution.copied = Copied(applied.version, applied.copied)
            receipt = Receipt(
                applied.version,
                push.head.base,
                staleness=applied.version - 1 - push.head.base,
                contributors=taken.workers,
                divisor=step.divisor,
                kernel=applied.kernel,
                again=applied.again,
                grad_norm=taken.grad_norm,
            )
            self._ledger.commit(push.head.name, push.fingerprint, receipt)
            outcomes[push.head.name] = Outcome(receipt, kernel_s=kernel_s)
        return outcomes

    def _abort(self, abort: Abort) -> Outcomes:
        missing = self._members.missed(abort.waiting)
        who = f"missing: {', '.join(missing)}" if missing else f"only {abort.arrived} workers have joined"
        outcomes: Outcomes = {}
        for worker in abort.waiting:
            error = BarrierTimeout(
                f"The deadline passed with {abort.arrived} of {abort.wanted} workers ({who}); nothing was applied.",
                remedy="Push again when the others are there; another worker may take a missing one's place.",
                missing=missing,
            )
            outcomes[self._waiting.pop(worker).head.name] = Outcome(error)
        return outcomes
