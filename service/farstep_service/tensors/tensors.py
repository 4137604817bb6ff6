"""The tensors of one session, and the only code that changes them: it carries out what the coordinator decides.

    receive      gradients or contents arrived under a name, and stay until that write is decided about
    carry_out    an instruction ──► its result
    finish       the instruction whose kernel failed midway, to its end

A result names the kernel that ran. Nothing here decides about workers, and nothing here knows the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import final

import torch

from farstep.errors import FarstepError, InternalError
from farstep.protocol.messages import PushHead, WriteName
from farstep_service.coordinator import (
    NOTHING_NAMED,
    Agreed,
    AtOnce,
    Awaited,
    DropBases,
    Failed,
    Grow,
    KeepBase,
    LeaveOut,
    NoStep,
    Result,
    SetMode,
    SetOptions,
    StepTaken,
    TakeStep,
    Write,
    Written,
    agreed,
)
from farstep_service.kernels.kernel import KernelSource, Rerun
from farstep_service.optimizers.rule import Rule
from farstep_service.plan import Plan
from farstep_service.store import Held
from farstep_service.tensors.arrived import Arrived, ArrivedContents, ArrivedPush
from farstep_service.tensors.closure_state import ClosureState
from farstep_service.tensors.contribution import Contribution, Copied
from farstep_service.tensors.kernel_state import KernelState
from farstep_service.tensors.reduction import ByContent, mean_evaluation, reduce_
from farstep_service.tensors.refusing import check_finite, nonfinite_in, told
from farstep_service.tensors.snapshot import TensorsRecord
from farstep_service.tensors.staleness import Bases, check_dense, compensate_, weigh_
from farstep_service.tensors.state import SessionState
from farstep_service.tensors.steps import Steps

log = logging.getLogger("farstep.session")


@dataclass(slots=True)
class _Unfinished:
    step: TakeStep
    pushes: list[ArrivedPush]
    agreed: Agreed = field(default_factory=Agreed)


@final
class Tensors:
    """Carry out what is decided about one session.

    Args:
        state: what steps change.

    Attributes:
        arrived: what came with writes that are not decided about.
        kernel_s: seconds that the kernel of the last step took.
    """

    def __init__(self, state: SessionState) -> None:
        self.state = state
        self.kernel_s = 0.0
        self.steps = Steps(state)
        self._bases = Bases()
        self.arrived = Arrived()
        self._unfinished: _Unfinished | None = None

    def record(self, *, pushes: bool = True) -> TensorsRecord:
        """Return all that there is, in memory of its own; no step is unfinished.

        Args:
            pushes: copy the gradients that wait, too; `waiting` says where a journal has them.
        """
        state = self.state
        return TensorsRecord(
            state.plan,
            tuple(state.groups),
            state.snapshot() if state.initialised else None,
            self.steps.accumulated.cloned(),
            self._bases.cloned(),
            {name: (each.head, each.contribution.cloned()) for name, each in self.arrived.pushes.items() if pushes},
            deepcopy(state.asked),
        )

    @classmethod
    def of(cls, record: TensorsRecord, *, kernels: KernelSource, device: torch.device) -> Tensors:
        """Return tensors that go on where a record was made; its memory belongs to them from now on."""
        state = state_of(record.plan, kernels=kernels, device=device)
        if record.snapshot is not None:
            state.restore(record.snapshot)
        state.groups = record.groups
        state.ask_again(record.asked)
        tensors = cls(state)
        tensors.steps = Steps(state, record.accumulated)
        tensors._bases = Bases(record.bases)
        for head, contribution in record.pushes.values():
            tensors.arrived.receive_push(head, contribution)
        return tensors

    @property
    def waiting_bytes(self) -> int:
        """Return the memory of the gradients that wait, for others or for the step they are accumulated for."""
        return sum(each.contribution.nbytes for each in self.arrived.pushes.values()) + self.steps.nbytes

    @property
    def kept_bytes(self) -> int:
        """Return what stays when the requests are over that brought it: rounds that are accumulated, and workspace."""
        return self.steps.nbytes

    def check_push(self, head: PushHead, contribution: Contribution) -> str:
        """Refuse a push that no step can take; return what in it holds NaN or Inf where that skips the step, or "".

        Raises:
            NotInitialised, InvalidRequest, InvalidOption, TensorMismatch, NonFinite: as `SessionState`, `Contribution`
                and `check_finite` say.
        """
        state, plan, nonfinite = self.state, self.state.plan, ""
        state.check_initialised()
        state.check_base(head.base, head.evaluation)
        options = state.whole if head.options == "push" else state.changed
        options(head.groups)  # refuses what is wrong with them
        contribution.decode_()
        contribution.check_indices()
        if plan.looks_at_gradients or contribution.journaled:
            contribution.secure_()
        if plan.nonfinite == "refuse":
            check_finite(contribution, head.name.worker, head.evaluation)
        elif plan.nonfinite == "skip" and (found := nonfinite_in(contribution, head.name.worker)[1]):
            nonfinite = f"{found}."
        if plan.consistency.delay_compensation:
            check_dense(contribution, head.name.worker)
        return nonfinite

    def forget_workers(self) -> None:
        """Let go of what is there for workers: pushes that wait, and versions that are kept."""
        self.arrived.pushes.clear()
        self._bases = Bases()

    def release(self, name: WriteName) -> None:
        """Let go of what arrived under a name, which is decided about."""
        self.arrived.release(name)

    # -- instructions -----------------------------------------------------------------------------------------------

    def do(self, instruction: AtOnce) -> None:
        """Carry out an instruction that cannot fail."""
        match instruction:
            case KeepBase():
                self._bases.keep(instruction.worker, self.state.hold())
            case DropBases():
                for worker in instruction.workers:
                    self._bases.forget(worker)
            case SetMode():
                self.state.plan = replace(self.state.plan, consistency=instruction.mode)
            case SetOptions():
                self.state.set_groups(self.state.given(instruction.changes))

    def carry_out(self, instruction: Awaited, *, rerun: Rerun | None = None) -> Result:
        """Carry out an instruction to its end; one that fails has changed nothing, or is unfinished.

        Args:
            rerun: how it ran before, for a replay; None for the first time.
        """
        match instruction:
            case TakeStep():
                pushes = [self.arrived.pushes[name] for name in instruction.pushes]
                return self._step(instruction, pushes, rerun)
            case LeaveOut():
                return self._leave_out([self.arrived.pushes[name] for name in instruction.pushes])
            case Write():
                return self._write(self.arrived.contents[instruction.name])
            case Grow():
                return self._grow(self.arrived.contents[instruction.name])

    @property
    def pending(self) -> bool:
        """Return whether a step is unfinished."""
        return self._unfinished is not None

    def postpone(self, step: TakeStep) -> None:
        """Leave a step to `finish`, for a replay of one that was interrupted."""
        self._unfinished = _Unfinished(step, [self.arrived.pushes[name] for name in step.pushes])

    def finish(self, *, rerun: Rerun | None = None) -> Result:
        """Complete the step whose kernel failed midway.

        Args:
            rerun: how it ran before, for a replay.

        Raises:
            StepInterrupted: it failed again.
        """
        unfinished = self._unfinished
        if unfinished is None:
            raise InternalError("No step is unfinished.")
        if rerun is not None or not self.state.pending:  # after a recovery, the step is taken from its beginning
            self._unfinished = None
            result = self._step(unfinished.step, unfinished.pushes, rerun)
            if isinstance(result, Failed) and result.unfinished:
                raise result.error
            return result
        taken = self.steps.finish(unfinished.agreed.disagreement)
        self._unfinished = None
        if taken is None:
            raise InternalError("An unfinished step is recorded, but the store has none.")
        self.kernel_s = 0.0
        self._note_copied(unfinished.pushes, taken)
        return taken

    # -- steps ------------------------------------------------------------------------------------------------------

    def _step(self, step: TakeStep, pushes: list[ArrivedPush], rerun: Rerun | None) -> Result:
        began = time.perf_counter()
        weights = step.weights
        if step.unnamed > 1:
            pushes, weights = self._ordered(pushes, weights, step.unnamed)
        state, options = self.state, NOTHING_NAMED
        try:
            options = agreed([push.head for push in pushes])
            lasting, passing = state.changed(options.lasting), state.whole(options.passing)
            made_up = self._make_up(pushes, weights, step.compensation)
            contributions = [push.contribution for push in pushes]
            gradients = reduce_(
                contributions, step.divisor, state.device, half_precision=self.steps.takes_half_precision
            )
            began = time.perf_counter()
            taken = self.steps.take(
                gradients,
                tuple([push.head.name.worker for push in pushes]),
                lasting,
                mean_evaluation([push.head.evaluation for push in pushes], step.divisor),
                weights[0] if self._alone(pushes) else 1.0,
                passing=passing,
                checked=len(pushes) == 1 and not made_up,
                disagreement=options.disagreement,
                rerun=rerun,
            )
        except Exception as exc:
            if state.pending:
                self._unfinished = _Unfinished(step, pushes, options)
            return Failed(told(exc, "The step"), unfinished=state.pending)
        if isinstance(taken, NoStep):
            self.kernel_s = 0.0
            return taken
        self.kernel_s = time.perf_counter() - began
        self._note_copied(pushes, taken)
        return taken

    def _note_copied(self, pushes: Sequence[ArrivedPush], taken: StepTaken) -> None:
        """Tell the contributions of a step which parameters it has written where their answers are made."""
        if copied := self.steps.copied:
            for push in pushes:
                push.contribution.copied = Copied(taken.version, copied)

    def _ordered(
        self, pushes: list[ArrivedPush], weights: Sequence[float], unnamed: int
    ) -> tuple[list[ArrivedPush], tuple[float, ...]]:
        """Return pushes in the order of their sum, which is the same in every run, and their weights.

        Names that are drawn at random are of no use for it: their workers follow in the order of what they bring.
        """
        first = len(pushes) - unnamed
        others = list(zip(pushes[first:], weights[first:], strict=True))
        others.sort(
            key=lambda each: (
                each[0].head.skip,
                repr(each[0].head.evaluation),
                repr(sorted(each[0].head.groups.items())),
            )
        )
        others.sort(key=lambda each: ByContent(each[0].contribution))
        return (
            pushes[:first] + [push for push, _ in others],
            (*weights[:first], *(weight for _, weight in others)),
        )

    def _alone(self, pushes: Sequence[ArrivedPush]) -> bool:
        """Return whether one push is a step, whose learning rate can make up for its staleness."""
        return len(pushes) == 1 and self.state.plan.policies.rounds == 1

    def _make_up(self, pushes: Sequence[ArrivedPush], weights: Sequence[float], compensation: float) -> bool:
        """Change gradients as the mode makes up for their staleness; return whether any was changed."""
        if not self._alone(pushes):
            for push, weight in zip(pushes, weights, strict=True):
                weigh_(push.contribution, weight)
        version = self.state.version
        stale = [push for push in pushes if push.head.base != version]
        if not compensation or not stale:
            return False  # finite numbers that are weighed stay so
        with ExitStack() as stack:
            now: Held = stack.enter_context(self.state.hold())
            for push in stale:
                base = self._bases.of(push.head.name.worker, push.head.base)
                if base is not None:
                    compensate_(push.contribution, now.buffers, base.buffers, compensation)
        return True

    def _leave_out(self, pushes: list[ArrivedPush]) -> Result:
        """Put options into force that came with pushes, since their workers are told that they arrived."""
        options, self.kernel_s = agreed([push.head for push in pushes]), 0.0
        try:
            self.state.whole(options.passing)
            self.state.set_groups(self.state.changed(options.lasting))
        except FarstepError as error:
            return Failed(error)
        return NoStep(disagreement=options.disagreement)

    # -- contents ---------------------------------------------------------------------------------------------------

    def _write(self, arrived: ArrivedContents) -> Result:
        assert arrived.head is not None
        self.kernel_s = 0.0
        try:
            receipt = self.state.put(arrived.head, arrived.contents)
        except FarstepError as error:
            return Failed(error)
        return Written(receipt.base, receipt.version, receipt.applied)

    def _grow(self, arrived: ArrivedContents) -> Result:
        assert arrived.plan is not None
        base, self.kernel_s = self.state.version, 0.0
        try:
            self.state.append_arrived(arrived.plan, arrived.contents)
        except Exception as exc:
            error = told(exc, "The param group")
            error.__cause__ = exc
            return Failed(error)
        return Written(base, self.state.version)


def state_of(plan: Plan, *, kernels: KernelSource, device: torch.device) -> SessionState:
    """Return the state of a session that is about to begin.

    Args:
        plan: what the session is.
        kernels: runs update rules.
        device: where parameters and state live.
    """
    if isinstance(plan.rule, Rule):
        return KernelState(plan, plan.rule, kernels=kernels, device=device)
    return ClosureState(plan, device=device)
