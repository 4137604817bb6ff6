"""A session as a state machine: what a coordinator decides and tensors carry out, put together.

    an event ──► coordinator ──► instructions ──► tensors
                      ▲                              │
                      └─────────── result ◄──────────┘        and an outcome for each write that was decided about

With a journal of its events and results, and a record of what it was at one moment, it is there again: `replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from farstep.errors import FarstepError, InternalError, Unavailable
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator import (
    Answer,
    Append,
    Coordinator,
    Event,
    Failed,
    Grow,
    LeaveOut,
    NoStep,
    Push,
    Put,
    Result,
    StepTaken,
    TakeStep,
    Write,
)
from farstep_service.coordinator.written import write_down
from farstep_service.kernels.kernel import Rerun
from farstep_service.tensors import Tensors, TensorsRecord


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a write: a receipt or an error, and the seconds its kernel took."""

    result: Receipt | FarstepError
    duplicate: bool = False
    kernel_s: float = 0.0


Outcomes = dict[WriteName, Outcome]
Journal = Callable[[Event | Result, float], None]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """All that a session is at one moment: what its coordinator knows, written down, and its tensors."""

    written: bytes
    tensors: TensorsRecord


@final
class StateMachine:
    """Let events happen to one session, one after the other.

    Args:
        coordinator: decides.
        tensors: carry out.
        journal: called with each event before it is applied, and with each result; None for no journal. An event that
            it refuses does not happen.

    Attributes:
        now: the time of the last event.
        late: outcomes of writes that were decided about on the occasion of something else, until they are told.
        until: asked in a replay with the version before each instruction that has a result; one that it returns True
            for is not carried out, and ends the replay.
        reference: a replay runs the reference kernel, whatever ran before.
    """

    def __init__(self, coordinator: Coordinator, tensors: Tensors, journal: Journal | None = None) -> None:
        self.coordinator = coordinator
        self.tensors = tensors
        self.now = 0.0
        self.late: Outcomes = {}
        self.journal = journal
        self.until: Callable[[int], bool] | None = None
        self.reference = False

    def happen(
        self,
        event: Event | Result,
        now: float,
        *,
        raising: WriteName | None = None,
        again: list[Result] | None = None,
    ) -> Outcomes:
        """Let an event happen, and everything that follows from it.

        Args:
            raising: the write whose error is raised instead of returned.
            again: the results that came of it, for a replay; where there are no more, the journal ended, and what
                follows happens for the first time.
        """
        coordinator, tensors, journal = self.coordinator, self.tensors, self.journal
        outcomes: Outcomes = {}
        self.now, kernel_s = now, 0.0
        happening: Event | Result | None = event
        known = again is not None  # it is in the journal
        while happening is not None:
            if journal is not None and not known:
                self._note(journal, happening, now)
            following, happening = coordinator.apply(happening, now), None
            known = bool(again)
            for instruction in following:
                if isinstance(instruction, Answer):
                    tensors.release(instruction.name)
                    is_receipt = isinstance(instruction.result, Receipt)
                    outcomes[instruction.name] = Outcome(instruction.result, kernel_s=kernel_s if is_receipt else 0.0)
                elif isinstance(instruction, TakeStep | LeaveOut | Write | Grow):
                    if self.until is not None and self.until(coordinator.version):
                        return outcomes
                    happening = self._carried_out(instruction, now, again)
                    kernel_s = tensors.kernel_s
                else:
                    tensors.do(instruction)
        if raising is not None and isinstance(error := outcomes[raising].result, FarstepError):
            raise error
        return outcomes

    def _note(self, journal: Journal, happening: Event | Result, now: float) -> None:
        """Write down what happens; where that fails, what arrived with it goes."""
        try:
            journal(happening, now)
        except BaseException:
            if isinstance(happening, Push | Put | Append):
                self.tensors.release(happening.head.name)
            raise

    def _carried_out(
        self, instruction: TakeStep | LeaveOut | Write | Grow, now: float, again: list[Result] | None
    ) -> Result:
        """Carry out an instruction; one that is cut short by an exception has changed nothing, or is unfinished."""
        if again:
            return self._replayed(instruction, again.pop(0))
        try:
            return self.tensors.carry_out(instruction)
        except BaseException:
            error = InternalError("This write was cut short; it was not applied.", remedy="Send it again.")
            failed = Failed(error, unfinished=self.tensors.pending)
            self.late |= self.happen(failed, now)  # others waited for the same step
            raise

    def _replayed(self, instruction: TakeStep | LeaveOut | Write | Grow, before: Result) -> Result:
        if isinstance(before, Failed):
            if before.unfinished and isinstance(instruction, TakeStep):
                self.tensors.postpone(instruction)
            return before
        return self._same(self.tensors.carry_out(instruction, rerun=self._how(before)), before)

    def finish(self) -> Outcomes:
        """Finish a step whose kernel failed midway, if there is one, before anything else happens.

        Raises:
            StepInterrupted: it failed again.
        """
        outcomes: Outcomes = {}
        try:
            while self.coordinator.unfinished:  # the step after it may fail midway, too
                outcomes |= self.happen(self.tensors.finish(), self.now)
        except BaseException:
            self.late |= outcomes
            raise
        return outcomes

    # -- written down, and again ------------------------------------------------------------------------------------

    def record(self, *, pushes: bool = True) -> SessionRecord:
        """Return all that the session is, in memory of its own.

        Args:
            pushes: the gradients that wait, too; a journal has them anyhow.

        Raises:
            StepInterrupted: a kernel failed midway, and again.
        """
        self.late |= self.finish()
        return SessionRecord(write_down(self.coordinator.state), self.tensors.record(pushes=pushes))

    def replay(self, event: Event | Result, now: float, results: Sequence[Result]) -> Outcomes:
        """Let an event of a journal happen again, with the kernels that ran then; what arrived has been received.

        Args:
            event, now: what happened, and when; a result is that of an instruction that was unfinished.
            results: what came of it then, in order.

        Raises:
            InternalError: something else came of it now.
        """
        if isinstance(event, StepTaken | NoStep):
            event = self._same(self.tensors.finish(rerun=self._how(event)), event)
        return self.happen(event, now, again=[*results])

    def _how(self, before: Result) -> Rerun | None:
        if not isinstance(before, StepTaken):
            return None
        return Rerun("reference") if self.reference else Rerun(before.kernel, before.switched)

    def _same(self, result: Result, before: Result) -> Result:
        """Return the result of a replay, which is that of the first time; but for its bits with another kernel.

        Raises:
            Unavailable: the kernel that ran cannot run here.
            InternalError: it is another one.
        """
        if isinstance(result, Failed) and isinstance(result.error, Unavailable) and not isinstance(before, Failed):
            took = f"took step {before.version} with the {before.kernel}" if isinstance(before, StepTaken) else "has a"
            raise cannot_run(self.tensors.state.plan.name, f"{took} kernel", result.error)
        alike = self.reference and isinstance(result, StepTaken) and isinstance(before, StepTaken)
        same = result == before or write_down(result) == write_down(before)  # NaN equals nothing
        if not same and not (alike and _counts_alike(result, before)):
            raise InternalError(f"A replay led to {result}, and the first time to {before}.")
        return result


def _counts_alike(result: Result, before: Result) -> bool:
    """Return whether two steps are the same but for their numbers."""
    assert isinstance(result, StepTaken)
    assert isinstance(before, StepTaken)
    return (result.version, result.contributors, result.again) == (before.version, before.contributors, before.again)


def cannot_run(session: str, what: str, why: FarstepError) -> Unavailable:
    """Return the error for a session that cannot come back, since a kernel cannot run here."""
    return Unavailable(
        f"Session {session!r} {what}, which cannot run here: {why.detail}",
        remedy=f"{why.remedy or 'Recover it where that kernel runs.'} Or start the server with `--replay reference`: "
        "the reference kernel takes the steps again, with bits that may differ, and workers are told that the state "
        "was rolled back.",
        field="kernel",
    )
