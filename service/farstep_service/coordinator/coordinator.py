"""The one place where a session changes: an event goes in, instructions come out.

    coordinator.apply(event, now)     what happened, admitted by a check  ──►  what there is to do
    tensors.carry_out(instruction)    one at a time                       ──►  a result, which is the next event

The checks refuse a request and leave no trace of it. `apply` never fails. Nothing here has a tensor, a clock, a lock or
I/O, and all that the coordinator knows is one value that can be written down (`CoordinatorState`): the same events and
results, from the same value on, lead to the same receipts.

A result is awaited for one instruction at a time. If its kernel failed midway the instruction stays unfinished, and is
carried out to its end before anything else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, Final, final

from farstep.errors import BarrierTimeout, FarstepError, Fenced, Unavailable
from farstep.protocol import Names
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator.checks import Checks, Running
from farstep_service.coordinator.events import (
    Append,
    ChangeMode,
    ChangeOptions,
    DropBase,
    Event,
    Failed,
    Heartbeat,
    Interrupt,
    Join,
    Leave,
    NoStep,
    Push,
    Put,
    Receive,
    Result,
    StepTaken,
    Tick,
    Written,
)
from farstep_service.coordinator.instructions import (
    Answer,
    Awaited,
    DropBases,
    Grow,
    Instruction,
    KeepBase,
    LeaveOut,
    SetMode,
    SetOptions,
    TakeStep,
    Write,
)
from farstep_service.coordinator.member import NAMED
from farstep_service.coordinator.modes.decisions import Abort, Pushed, Refuse, Skip, Step
from farstep_service.coordinator.modes.table import mode_for

INITIALISE_WITHIN_S: Final = 60.0
"""How long the first contents may take before another worker is asked for them."""


@final
class Coordinator(Checks):
    """Decide what becomes of the writes of one session; for the argument, and for what it refuses, see `Checks`."""

    # -- events -----------------------------------------------------------------------------------------------------

    def apply(self, event: Event | Result, now: float) -> list[Instruction]:
        """Apply an event and return the instructions that follow, in order; only the last one may have a result.

        Args:
            event: admitted by the check that belongs to it; a result is that of the instruction that is awaited.
            now: seconds of a clock that never goes back.
        """
        out: list[Instruction] = []
        APPLY[type(event)](self, event, now, out)
        return out

    def _join(self, event: Join, now: float, out: list[Instruction]) -> None:
        worker, roster, state = event.worker, self.roster, self._state
        what = f"Worker {worker!r} joined again while this push waited; it was not applied."
        error = Fenced(what, remedy="If that was another process, give each its own name.", field="epoch")
        self._withdraw(worker, error, now, out)
        self._sweep(now)
        for gone in sorted({*roster.make_room(worker, now), *roster.forgotten(now), worker}):
            self._remove(gone, out, keep=gone == worker)
        roster.join(worker, now, named=event.named)
        self._mode.joined(worker)
        if not state.initialised:
            chosen = state.initialiser
            if chosen is None or chosen[0] == worker or now >= chosen[1] or not roster.is_live(chosen[0]):
                state.initialiser = worker, now + INITIALISE_WITHIN_S
        self._decide(now, out)

    def _leave(self, event: Leave, now: float, out: list[Instruction]) -> None:
        what = f"Worker {event.worker!r} left while this push waited; it was not applied."
        self._withdraw(event.worker, Fenced(what, remedy="Join again to go on.", field="epoch"), now, out)
        self._remove(event.worker, out)
        self._decide(now, out)

    def _remove(self, worker: str, out: list[Instruction], *, keep: bool = False) -> None:
        """Let a member go of which nothing waits; keep its record if it joins at once."""
        if worker not in self.roster:
            return
        self._mode.left(worker)
        if self.roster.base(worker) is not None:
            out.append(DropBases((worker,)))
        if not keep:
            self.roster.leave(worker)

    def _heartbeat(self, event: Heartbeat, now: float, out: list[Instruction]) -> None:
        self._heard(event.worker, now)

    def _receive(self, event: Receive, now: float, out: list[Instruction]) -> None:
        self._received(event.worker, now, out)

    def _received(self, worker: str, now: float, out: list[Instruction]) -> None:
        self._heard(worker, now)
        if self.keeps_bases and self._state.initialised and worker not in self._waiting:
            self._keep_base(worker, out)

    def _push(self, event: Push, now: float, out: list[Instruction]) -> None:
        head, worker = event.head, event.head.name.worker
        self._heard(worker, now)
        skip = head.skip or bool(event.nonfinite)
        if self.keeps_bases and not skip and not self._knows_base(worker, head.base, out):
            self._run(LeaveOut((head.name,)), (event,), out, Refuse(worker, "stale"))
            return
        self._waiting[worker] = event
        self.roster.wait(worker)
        self._mode.offer(Pushed(head.name, event.fingerprint, head.base, skip), now)
        self._decide(now, out)

    def _put(self, event: Put, now: float, out: list[Instruction]) -> None:
        self._run(Write(event.head.name), (event,), out)

    def _append(self, event: Append, now: float, out: list[Instruction]) -> None:
        if not event.there:
            self._run(Grow(event.head.name), (event,), out)
            return
        self.roster.learned(event.head.group, event.head.name)
        version = self._state.version
        self._commit_write(event, Receipt(version, version, applied=False), now, out)

    def _change_options(self, event: ChangeOptions, now: float, out: list[Instruction]) -> None:
        out.append(SetOptions(event.changes))

    def _change_mode(self, event: ChangeMode, now: float, out: list[Instruction]) -> None:
        mode, roster, state = event.mode, self.roster, self._state
        state.switched = True
        if mode == state.consistency:
            return
        self._sweep(now)
        for gone in roster.surplus(mode.places, now):
            self._remove(gone, out)
        state.consistency = mode
        out.append(SetMode(mode))
        roster.change(mode.places, mode.lease_s, now)
        self._mode = mode_for(mode, roster)
        for worker in sorted(self._waiting):
            push = self._waiting[worker]
            skip = push.head.skip or bool(push.nonfinite)
            self._mode.offer(Pushed(push.head.name, push.fingerprint, push.head.base, skip), now)
        if not self.keeps_bases:
            self._drop_bases([*roster.bases()], out)
        self._decide(now, out)

    def _drop_base(self, event: DropBase, now: float, out: list[Instruction]) -> None:
        bases = self.roster.bases()
        if bases:
            self._drop_bases([min(bases, key=bases.__getitem__)], out)

    def _interrupt(self, event: Interrupt, now: float, out: list[Instruction]) -> None:
        error = Unavailable(
            f"The server of session {self._state.session!r} is shutting down; this push, which waited, was not "
            "applied.",
            remedy="Push again when the server is back.",
        )
        for worker in [*self._waiting]:
            self._withdraw(worker, error, now, out)

    def _tick(self, event: Tick, now: float, out: list[Instruction]) -> None:
        self._decide(now, out)

    # -- what events have in common ---------------------------------------------------------------------------------

    def _heard(self, worker: str, now: float) -> None:
        """Renew the lease of a member."""
        self._sweep(now)
        if self.roster.heard(worker, now):
            self._mode.returned(worker)

    def _sweep(self, now: float) -> None:
        """Let the leases that have run out lapse, which may lead to a decision."""
        if lapsed := self.roster.sweep(now):
            self._mode.lapsed(lapsed)
            self._due = now

    def _withdraw(self, worker: str, error: FarstepError, now: float, out: list[Instruction]) -> None:
        """Take the push of a worker that waits back, if there is one, and tell it why."""
        push = self._waiting.pop(worker, None)
        if push is not None:
            self._mode.withdraw(worker)
            self.roster.answered(worker, now)
            out.append(Answer(push.head.name, error))

    def _keep_base(self, worker: str, out: list[Instruction]) -> None:
        self.roster.keep_base(worker, self._state.version)
        out.append(KeepBase(worker))

    def _drop_bases(self, workers: Sequence[str], out: list[Instruction]) -> None:
        for worker in workers:
            self.roster.keep_base(worker, None)
        if workers:
            out.append(DropBases(tuple(workers)))

    def _knows_base(self, worker: str, base: int, out: list[Instruction]) -> bool:
        """Return whether the parameters are known that a push was computed on; keep them as long as it waits."""
        self._drop_bases([each for each in self.roster.bases() if not self.roster.is_live(each)], out)
        if self.roster.base(worker) != base and base == self._state.version:
            self._keep_base(worker, out)
        return self.roster.base(worker) == base

    # -- decisions --------------------------------------------------------------------------------------------------

    def _decide(self, now: float, out: list[Instruction]) -> None:
        """Act on decisions up to the first instruction with a result."""
        while self._state.running is None:
            self._sweep(now)
            decision = self._mode.decide(self._state.version, now)
            if decision is None:
                self._due = None
                return
            pushes = [self._waiting.pop(worker) for worker in decision.workers]
            for worker in decision.workers:
                self.roster.answered(worker, now)
            if not isinstance(decision, Refuse):
                for worker in decision.without:
                    self.roster.lapse(worker, now)
                if decision.without:
                    self._mode.lapsed(decision.without)
            if isinstance(decision, Abort):
                error = aborted(decision)
                out += [Answer(push.head.name, error) for push in pushes]
            elif isinstance(decision, Step):
                self._begin_step(decision, pushes, out)
            else:
                self._run(LeaveOut(tuple(push.head.name for push in pushes)), tuple(pushes), out, decision)

    def _begin_step(self, decision: Step, pushes: list[Push], out: list[Instruction]) -> None:
        is_named, mode = self.roster.is_named, self._state.consistency
        unnamed = 0
        if len(pushes) > 1:
            named = [push for push in pushes if is_named(push.head.name.worker)]
            unnamed = len(pushes) - len(named)
            if unnamed:
                pushes = named + [push for push in pushes if not is_named(push.head.name.worker)]
        step = TakeStep(
            tuple([push.head.name for push in pushes]),
            unnamed,
            decision.divisor,
            tuple([mode.factor(self._state.version - push.head.base) for push in pushes]),
            mode.delay_compensation,
        )
        self._run(step, tuple(pushes), out, decision)

    def _run(
        self,
        instruction: Awaited,
        cause: tuple[Push | Put | Append, ...],
        out: list[Instruction],
        decision: Step | Skip | Refuse | None = None,
    ) -> None:
        self._state.running = Running(instruction, cause, decision)
        out.append(instruction)

    # -- results ----------------------------------------------------------------------------------------------------

    def _taken(self, result: StepTaken, now: float, out: list[Instruction]) -> None:
        running = self._over()
        assert isinstance(running.decision, Step)
        self._state.version = result.version
        alike = {
            "contributors": Names(result.contributors),
            "divisor": running.decision.divisor,
            "kernel": result.kernel,
            "again": result.again,
            "facts": result.facts,
            "disagreement": result.disagreement,
        }
        self._commit(running, result.version - 1, alike, out)
        self._mode.completed(running.decision, result.version)
        self._decide(now, out)

    def _no_step(self, result: NoStep, now: float, out: list[Instruction]) -> None:
        running, version = self._over(), self._state.version
        decision, reason, detail = running.decision, result.reason, result.detail
        assert decision is not None
        if isinstance(decision, Refuse):
            reason = decision.reason
        elif isinstance(decision, Skip):
            found = next((each.nonfinite for each in running.cause if isinstance(each, Push) and each.nonfinite), "")
            reason, detail = ("nonfinite", found) if found else ("skipped", "")
        divisor = 1 if isinstance(decision, Refuse) else decision.divisor
        disagreement = result.disagreement
        alike = {
            "applied": False,
            "contributors": Names(result.contributors),
            "divisor": divisor,
            "reason": reason,
            "detail": detail,
            "disagreement": disagreement,
        }
        self._commit(running, version, alike, out)
        if not isinstance(decision, Refuse):
            self._mode.completed(decision, version)
        self._decide(now, out)

    def _over(self) -> Running:
        """Return the instruction whose result has come; no other one is awaited any more."""
        running = self._state.running
        assert running is not None
        self._state.running = None
        return running

    def _commit(self, running: Running, before: int, alike: dict[str, Any], out: list[Instruction]) -> None:
        """Record what was done about pushes, and tell their workers: what is alike, and what is each one's own.

        Args:
            before: the version before the step, or the present one where there was none.
            alike: what all receipts say.
        """
        weights = running.instruction.weights if isinstance(running.instruction, TakeStep) else repeat(1.0)
        for push, weight in zip(running.cause, weights):  # noqa: B905  # one may be endless
            name, base = push.head.name, push.head.base  # type: ignore[union-attr]  # a decision is about pushes
            receipt = Receipt(self._state.version, base, before - base, weight=weight, **alike)
            self.roster.commit(name, push.fingerprint, receipt)
            out.append(Answer(name, receipt))

    def _written(self, result: Written, now: float, out: list[Instruction]) -> None:
        (event,) = self._over().cause
        assert isinstance(event, Put | Append)
        self._state.version, self._state.initialised = result.version, True
        if isinstance(event, Append):
            self.roster.added(event.head.group, event.head.name)
            for other in self.roster.names():
                if error := self.outgrown(other):
                    self._withdraw(other, error, now, out)
        self._commit_write(event, Receipt(result.version, result.base, applied=result.applied), now, out)

    def _commit_write(self, event: Put | Append, receipt: Receipt, now: float, out: list[Instruction]) -> None:
        name = event.head.name
        self.roster.commit(name, event.fingerprint, receipt)
        self._received(name.worker, now, out)
        out.append(Answer(name, receipt))

    def _failed(self, result: Failed, now: float, out: list[Instruction]) -> None:
        running = self._over()
        self._state.running = replace(running, unfinished=True) if result.unfinished else None
        out += [Answer(event.head.name, result.error) for event in running.cause]
        self._decide(now, out)


APPLY: Final[dict[type, Callable[..., None]]] = {
    Join: Coordinator._join,
    Leave: Coordinator._leave,
    Heartbeat: Coordinator._heartbeat,
    Receive: Coordinator._receive,
    Push: Coordinator._push,
    Put: Coordinator._put,
    Append: Coordinator._append,
    ChangeOptions: Coordinator._change_options,
    ChangeMode: Coordinator._change_mode,
    DropBase: Coordinator._drop_base,
    Interrupt: Coordinator._interrupt,
    Tick: Coordinator._tick,
    StepTaken: Coordinator._taken,
    NoStep: Coordinator._no_step,
    Written: Coordinator._written,
    Failed: Coordinator._failed,
}


def aborted(abort: Abort) -> BarrierTimeout:
    """Return what all are told whose pushes were given up."""
    arrived, missing = len(abort.workers), [*abort.missing[:NAMED]]
    more = len(abort.missing) - len(missing)
    joined = "1 worker has" if arrived == 1 else f"{arrived} workers have"
    named = ", ".join(missing) + (f" and {more} more" if more else "")
    who = f"missing: {named}" if missing else f"only {joined} joined"
    return BarrierTimeout(
        f"The deadline passed with {arrived} of {abort.wanted} workers ({who}); nothing was applied.",
        remedy="Push again when the others are there; another worker may take a missing one's place.",
        missing=missing,
        missing_count=len(abort.missing),
    )
