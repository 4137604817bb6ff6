"""The pushes of one session that wait, and the steps that they become.

    offer      a push comes in; what that decides is done at once
    withdraw   the push of a worker that is shut out is taken back
    tick       time has passed: leases and deadlines that are over decide
    switch     another mode goes on with the pushes that wait
    interrupt  every push that waits is taken back
    finish     a step whose kernel failed midway is completed, before anything else happens

`aggregation.Rounds` decides; here are the tensors. Whoever offers a push has checked it. Each of the verbs returns what
became of every push that was decided about.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, assert_never, final

from farstep.consistency import Consistency
from farstep.errors import BarrierTimeout, FarstepError, InternalError
from farstep.hyper import Hyper
from farstep.messages import PushHead, WriteName
from farstep.receipt import Receipt
from farstep.wire import Names
from farstep_service.coordinator import Abort, Agreed, Decision, Pushed, Refuse, Rounds, Said, Skip, Step, agreed
from farstep_service.gradients import Contribution, Copied
from farstep_service.reduction import ByContent, mean_evaluation, reduce_
from farstep_service.session.outcomes import Outcome, Outcomes, told
from farstep_service.store import Held
from farstep_service.tensors.staleness import Bases, check_dense, compensate_, weigh_
from farstep_service.tensors.state import SessionState
from farstep_service.tensors.steps import Left, Steps, Taken

NAMED: Final = 20
"""Workers whom the error of a barrier names, of thousands that may be missing."""


@dataclass(slots=True)
class _Push:
    pushed: Pushed
    head: PushHead
    contribution: Contribution
    nonfinite: str


@dataclass(slots=True)
class _Unfinished:
    """A step whose kernel failed midway: what has to be recorded when the store has finished it."""

    pushes: list[_Push]
    step: Step
    weights: list[float]


@final
class Pushes:
    """Take the steps that pushes complete, and answer those that they do not.

    Args:
        state: what the steps change; the mode of its plan makes up for stale gradients.
        rounds: decides.
    """

    def __init__(self, state: SessionState, rounds: Rounds) -> None:
        self._state = state
        self._steps = Steps(state)
        self._rounds = rounds
        self._waiting: dict[WriteName, _Push] = {}
        self._unfinished: _Unfinished | None = None
        self._bases = Bases()

    @property
    def _mode(self) -> Consistency:
        return self._state.plan.consistency

    @property
    def nbytes(self) -> int:
        """Return the memory of the gradients that wait, for others or for the step they are accumulated for."""
        return sum(each.contribution.nbytes for each in self._waiting.values()) + self._steps.nbytes

    @property
    def kept_bytes(self) -> int:
        """Return what stays when the requests are over that brought it: rounds that are accumulated, and workspace."""
        return self._steps.nbytes

    def forget_base(self) -> bool:
        """Let the oldest of the versions go that workers have; return whether there was one.

        A push that was computed on it is refused as stale, and answered with parameters to go on from.
        """
        return self._bases.forget_oldest()

    @property
    def deadline(self) -> float | None:
        """Return the time at which `tick` may have something to do."""
        return self._rounds.deadline if self._unfinished is None else None

    @property
    def keeps_bases(self) -> bool:
        """Say whether versions that workers have received are kept."""
        return bool(self._mode.delay_compensation)

    def check(self, contribution: Contribution, worker: str) -> None:
        """Refuse gradients that the mode does not take.

        Raises:
            TensorMismatch: see `check_dense`.
        """
        if self._mode.delay_compensation:
            check_dense(contribution, worker)

    def offer(
        self, head: PushHead, contribution: Contribution, fingerprint: str, now: float, *, nonfinite: str = ""
    ) -> Outcomes:
        """Add a push; for the other arguments see `Session.push`.

        Args:
            nonfinite: what in its gradients holds NaN or Inf, so that nobody takes the step; "" for nothing.
        """
        pushed = Pushed(head.name, fingerprint, head.base, head.skip or bool(nonfinite))
        push = _Push(pushed, head, contribution, nonfinite)
        if self.keeps_bases and not pushed.skip and not self._knows_base(head):
            return self._leave_out(Refuse(head.name.worker, "stale"), [push])
        self._waiting[head.name] = push
        self._rounds.offer(pushed, now)
        return self.tick(now)

    def withdraw(self, worker: str, error: FarstepError, now: float) -> Outcomes:
        """Take the push of a worker that waits back, if there is one, and tell it why."""
        pushed = self._rounds.withdraw(worker, now)
        if pushed is None:
            return {}
        del self._waiting[pushed.name]
        return {pushed.name: Outcome(error)}

    def interrupt(self, error: FarstepError, now: float) -> Outcomes:
        """Take every push that waits back, and tell their workers why."""
        outcomes: Outcomes = {}
        for name in [*self._waiting]:
            outcomes |= self.withdraw(name.worker, error, now)
        return outcomes

    def tick(self, now: float) -> Outcomes:
        """Do what there is to decide; nothing while a step is unfinished."""
        outcomes: Outcomes = {}
        while self._unfinished is None and (decided := self._rounds.decide(self._state.version, now)) is not None:
            decision, pushed = decided
            pushes = [self._waiting.pop(each.name) for each in pushed]
            if isinstance(decision, Step | Skip):
                pushes = self._ordered(pushes)
                decision = replace(decision, workers=tuple(push.pushed.worker for push in pushes))
            outcomes |= self._act(decision, pushes)
        return outcomes

    def switch(self, now: float) -> Outcomes:
        """Go on in the mode that the plan has now with the pushes that wait."""
        self._rounds.switch(self._mode, now)
        if not self.keeps_bases:
            self._bases.keep_only(frozenset())
        return self.tick(now)

    def finish(self) -> Outcomes:
        """Finish an interrupted step, if there is one, before anything else happens."""
        if self._unfinished is None:
            return {}
        taken = self._steps.finish()
        unfinished, self._unfinished = self._unfinished, None
        if taken is None:
            raise InternalError("An interrupted step is recorded, but the store has none.")
        return self._taken(unfinished.step, unfinished.pushes, taken, unfinished.weights, 0.0)

    # -- what a worker has ------------------------------------------------------------------------------------------

    def received(self, worker: str) -> None:
        """Note that a worker receives the present version."""
        if self.keeps_bases and self._state.initialised and worker not in self._rounds:
            self._bases.keep(worker, self._state.hold())

    def left(self, worker: str) -> None:
        """Note that a worker has left."""
        self._bases.forget(worker)

    def _knows_base(self, head: PushHead) -> bool:
        """Say whether the parameters are known that a push was computed on; keep them as long as it waits."""
        worker = head.name.worker
        members = self._rounds.members
        self._bases.keep_only(frozenset(each for each in members.names() if members.is_live(each)))
        if self._bases.of(worker, head.base) is None and head.base == self._state.version:
            self._bases.keep(worker, self._state.hold())
        return self._bases.of(worker, head.base) is not None

    # -- decisions --------------------------------------------------------------------------------------------------

    def _ordered(self, pushes: list[_Push]) -> list[_Push]:
        """Return the pushes of one step in the order of their sum, which is the same in every run.

        Those of workers with a name of their own come first, in its order. Names that are drawn at random are of no
        use for it: the others follow in the order of what they bring.
        """
        is_named = self._rounds.members.is_named
        others = [push for push in pushes if not is_named(push.pushed.worker)]
        if not others:
            return pushes
        named = [push for push in pushes if is_named(push.pushed.worker)]
        others.sort(
            key=lambda push: (push.pushed.skip, repr(push.head.evaluation), repr(sorted(push.head.groups.items())))
        )
        return named + sorted(others, key=lambda push: ByContent(push.contribution))

    def _act(self, decision: Decision, pushes: list[_Push]) -> Outcomes:
        match decision:
            case Step():
                return self._step(decision, pushes)
            case Skip() | Refuse():
                return self._leave_out(decision, pushes)
            case Abort():
                return _aborted(decision, pushes)
            case _:
                assert_never(decision)

    def _step(self, step: Step, pushes: list[_Push]) -> Outcomes:
        began = time.perf_counter()
        weights = [self._mode.factor(self._state.version - push.head.base) for push in pushes]
        try:
            lasting, passing = self._options(pushes)
            made_up = self._make_up(pushes, weights)
            contributions = [push.contribution for push in pushes]
            gradients = reduce_(contributions, step.divisor, self._state.device, narrow=self._steps.narrow)
            began = time.perf_counter()
            evaluation = mean_evaluation([push.head.evaluation for push in pushes], step.divisor)
            lr_factor = weights[0] if self._alone(pushes) else 1.0
            checked = len(pushes) == 1 and not made_up
            taken = self._steps.take(
                gradients, step.workers, lasting, evaluation, lr_factor, passing=passing, checked=checked
            )
        except Exception as exc:
            if self._state.pending:
                self._unfinished = _Unfinished(pushes, step, weights)
            error = told(exc, "The step")
            return {push.head.name: Outcome(error) for push in pushes}
        if isinstance(taken, Left):
            left = replace(step.told(self._state.version), applied=False, reason=taken.reason, detail=taken.detail)
            return self._commit(step, pushes, left, weights)
        return self._taken(step, pushes, taken, weights, time.perf_counter() - began)

    def _alone(self, pushes: Sequence[_Push]) -> bool:
        """Say whether one push is a step, whose learning rate can make up for its staleness."""
        return len(pushes) == 1 and self._state.plan.policy.accumulate == 1

    def _make_up(self, pushes: Sequence[_Push], weights: Sequence[float]) -> bool:
        """Change gradients as the mode makes up for their staleness; return whether any was changed."""
        if not self._alone(pushes):
            for push, weight in zip(pushes, weights, strict=True):
                weigh_(push.contribution, weight)
        stale = [push for push in pushes if push.head.base != self._state.version]
        if not self.keeps_bases or not stale:
            return False  # finite numbers that are weighed stay so
        with ExitStack() as stack:
            now: Held = stack.enter_context(self._state.hold())
            for push in stale:
                base = self._bases.of(push.head.name.worker, push.head.base)
                if base is not None:
                    compensate_(push.contribution, now.buffers, base.buffers, self._mode.delay_compensation)
        return True

    def _leave_out(self, decision: Skip | Refuse, pushes: list[_Push]) -> Outcomes:
        """Commit pushes that are not applied; options they changed hold, since their workers are told they arrived."""
        try:
            self._state.set_groups(self._options(pushes)[0])
        except FarstepError as error:
            return {push.head.name: Outcome(error) for push in pushes}
        left = decision.told(self._state.version)
        if nonfinite := next((push.nonfinite for push in pushes if push.nonfinite), ""):
            left = replace(left, reason="nonfinite", detail=nonfinite)
        return self._commit(decision, pushes, left)

    def _options(self, pushes: Sequence[_Push]) -> tuple[dict[int, Hyper], dict[int, Hyper]]:
        """Return the groups that the options of several pushes lead to: from now on, and for their step alone.

        Raises:
            InvalidOption: options that are right by themselves and wrong together.
        """
        options = _agreed(pushes)
        return self._state.changed(options.lasting), self._state.whole(options.passing)

    def _taken(
        self, step: Step, pushes: Sequence[_Push], taken: Taken, weights: Sequence[float], kernel_s: float
    ) -> Outcomes:
        applied = taken.applied
        if applied.copied:
            for push in pushes:
                push.contribution.copied = Copied(applied.version, applied.copied)
        receipt = replace(
            step.told(applied.version),
            contributors=Names(taken.workers),
            kernel=applied.kernel,
            again=applied.again,
            grad_norm=taken.grad_norm,
        )
        return self._commit(step, pushes, receipt, weights, kernel_s)

    def _commit(
        self,
        decision: Step | Skip | Refuse,
        pushes: Sequence[_Push],
        receipt: Receipt,
        weights: Sequence[float] = (),
        kernel_s: float = 0.0,
    ) -> Outcomes:
        if len(pushes) > 1:
            receipt = replace(receipt, disagreement=_agreed(pushes).disagreement)
        receipts = self._rounds.commit(decision, [push.pushed for push in pushes], receipt, weights)
        return {name: Outcome(receipt, kernel_s=kernel_s) for name, receipt in receipts.items()}


def _agreed(pushes: Sequence[_Push]) -> Agreed:
    heads = [push.head for push in pushes]
    return agreed([Said(head.name.worker, head.groups, head.options == "push") for head in heads])


def _aborted(abort: Abort, pushes: list[_Push]) -> Outcomes:
    """Return the same answer for all whose pushes were given up."""
    arrived, missing = len(abort.workers), [*abort.missing[:NAMED]]
    more = len(abort.missing) - len(missing)
    joined = "1 worker has" if arrived == 1 else f"{arrived} workers have"
    named = ", ".join(missing) + (f" and {more} more" if more else "")
    who = f"missing: {named}" if missing else f"only {joined} joined"
    error = BarrierTimeout(
        f"The deadline passed with {arrived} of {abort.wanted} workers ({who}); nothing was applied.",
        remedy="Push again when the others are there; another worker may take a missing one's place.",
        missing=missing,
        missing_count=len(abort.missing),
    )
    return {push.head.name: Outcome(error) for push in pushes}
