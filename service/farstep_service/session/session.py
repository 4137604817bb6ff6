"""The single writer of one session: it orders writes, applies each exactly once, and owns the version.

    a write ──► ledger: new? ──► validation ──► aggregation: a step yet? ──► store: one atomic update ──► receipts
                   │ seen before                    │ not yet: it waits
                   ▼                                ▼
             the old receipt                  a later write, or the deadline, decides

A session is plain and synchronous: its host calls one method at a time. Nothing here knows HTTP, threads or clocks; the
time comes in with the call. Writes that are refused leave no trace: their sequence is not consumed, and the lease of
their worker is not renewed. One that is taken in, and waits for others or finishes a step, does renew it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import final

import torch

from farstep.consistency import Consistency
from farstep.errors import StepInterrupted, Unavailable
from farstep.growth import AppendHead
from farstep.hyper import Hyper
from farstep.messages import PushHead, PutHead, WriteName
from farstep_service.contents import Contents
from farstep_service.coordinator import Ledger, Rounds, mismatch
from farstep_service.durability import Snapshot
from farstep_service.gradients import Contribution
from farstep_service.kernel import KernelSource
from farstep_service.layout import Layout
from farstep_service.plan import Plan
from farstep_service.session.admission import Admission
from farstep_service.session.attendance import Attendance
from farstep_service.session.growth import Growth, room_for
from farstep_service.session.membership import Membership
from farstep_service.session.outcomes import Outcome, Outcomes
from farstep_service.session.pushes import Pushes
from farstep_service.store import Held
from farstep_service.tensors.beginning import state_of
from farstep_service.tensors.state import GroupChanges


@final
class Session:
    """Order the writes of one session.

    Args:
        plan: what the session is.
        incarnation: a name for this life of the session, random hex.
        kernels: runs the update rules.
        device: where parameters and state live.
    """

    def __init__(self, plan: Plan, *, incarnation: str, kernels: KernelSource, device: str) -> None:
        self.incarnation = incarnation
        self._state = state_of(plan, kernels=kernels, device=torch.device(device))
        self._ledger = Ledger()
        self._rounds = Rounds(plan.consistency, self._ledger)
        self._members = self._rounds.members
        self._membership = Membership(plan.name, self._rounds, self._ledger)
        self._pushes = Pushes(self._state, self._rounds)
        self._attendance = Attendance(self._membership, self._pushes)
        self._growth = Growth(self._state, self._membership)
        self._admission = Admission(incarnation, self._state, self._ledger, self._membership)

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Return what the session is by now: it may have grown, and gone over to another mode."""
        return self._state.plan

    @property
    def initialised(self) -> bool:
        """Say whether the first parameters have arrived."""
        return self._state.initialised

    @property
    def version(self) -> int:
        """Return the count of committed writes that changed the contents."""
        return self._state.version

    @property
    def groups(self) -> Sequence[Hyper]:
        """Return the current options of each param group."""
        return self._state.groups

    @property
    def workers(self) -> list[str]:
        """Return the workers that joined, in the order of their names."""
        return self._members.names()

    @property
    def worker_count(self) -> int:
        """Return how many workers there are."""
        return len(self._members)

    def workers_after(self, worker: str, most: int) -> list[str]:
        """Return the first `most` of the workers whose names come after one."""
        return self._members.names_after(worker, most)

    @property
    def deadline(self) -> float | None:
        """Return the time at which `tick` may have something to decide."""
        return self._pushes.deadline

    def position(self, worker: str) -> tuple[int, int, bool]:
        """Return a worker's epoch (0: none), its last committed sequence, and whether a push of it waits."""
        self._pushes.finish()
        epoch = self._members.epoch(worker)
        return epoch, self._ledger.last(worker) if epoch else 0, worker in self._rounds

    def nbytes(self) -> dict[str, int]:
        """Return the memory the session takes, in bytes by kind."""
        return {**self._state.nbytes(), "waiting": self._pushes.nbytes}

    @property
    def held_bytes(self) -> int:
        """Return the memory that the session holds, but for gradients that wait, whose requests are in flight."""
        return sum(self._state.nbytes().values()) + self._pushes.kept_bytes

    def coming_bytes(self, growing: int = 0) -> int:
        """Return the bytes that the next write may take beside that; see `SessionState.coming_bytes`."""
        return self._state.coming_bytes(growing)

    def forget_base(self) -> bool:
        """Let go of what it can do without; see `Pushes.forget_base`."""
        return self._pushes.forget_base()

    # -- membership -------------------------------------------------------------------------------------------------

    def lease_s(self, worker: str, now: float) -> float:
        """Return how long a worker's lease still runs: all of it while a push of it waits, 0 for one not live."""
        return self._members.left_s(worker, now)

    def join(self, worker: str, now: float, *, named: bool = True) -> tuple[int, Outcomes]:
        """Open a new epoch of a worker that knows all groups, fencing its older one; return it, and what that decided.

        Args:
            named: its name was chosen; see `Members.join`.

        Raises:
            SessionFull: the mode's places are taken by workers that are live.
        """
        outcomes = self._pushes.finish()
        epoch, decided = self._attendance.join(worker, now, named=named)
        return epoch, outcomes | decided

    def leave(self, worker: str, epoch: int, now: float) -> Outcomes:
        """Give a worker's place up; an epoch that is not current has nothing to give up."""
        outcomes = self._pushes.finish()
        if self._members.epoch(worker) != epoch:
            return outcomes
        return outcomes | self._attendance.leave(worker, now)

    def received(self, worker: str, epoch: int, now: float) -> None:
        """Note that a worker is being sent the present version, if that is its epoch."""
        if epoch and self._members.epoch(worker) == epoch:
            self._rounds.heard(worker, now)
            self._pushes.received(worker)

    def renew(self, worker: str, epoch: int, incarnation: str, now: float) -> tuple[bool, int]:
        """Renew a worker's lease without a write; return whether it had run out, and how many workers are live.

        Raises:
            SessionLost, Fenced: the worker joined another life of the session, or its epoch is over.
        """
        self._admission.check_worker(worker, epoch, incarnation)
        lapsed = not self._members.is_live_at(worker, now)
        self._rounds.heard(worker, now)
        return lapsed, self._members.live

    def set_consistency(self, mode: Consistency, now: float) -> Outcomes:
        """Go on in another mode, which is offered the pushes that wait in the order of their workers' names.

        Raises:
            SessionFull: there are more live workers than the mode has places for.
            InvalidOption: the optimizer does not go with the mode. Nothing has changed then, whatever the error.
        """
        outcomes = self._pushes.finish()
        plan = replace(self.plan, consistency=mode)
        plan.check_consistency()
        if mode == self.plan.consistency:
            return outcomes
        self._membership.make_fit(mode, now)
        self._state.plan = plan
        return outcomes | self._pushes.switch(now)

    def interrupt(self, now: float) -> Outcomes:
        """Take back every push that waits, because the server is about to end."""
        error = Unavailable(
            f"The server of session {self.plan.name!r} is shutting down; this push, which waited, was not applied.",
            remedy="Push again when the server is back.",
        )
        return self._pushes.interrupt(error, now)

    def layout_at(self, name: WriteName) -> Layout:
        """Return the layout that a worker knew when it made a write: the session's, or what it was before it grew."""
        return self._membership.layout_at(name, self.plan.layout)

    def layout_of(self, worker: str) -> Layout:
        """Return the layout that a worker knows."""
        known = self._membership.groups(worker, len(self.plan.groups))
        return self.plan.layout if known == len(self.plan.groups) else self.plan.layout.first(known)

    # -- writes -----------------------------------------------------------------------------------------------------

    def check(self, name: WriteName, incarnation: str) -> None:
        """Refuse what can be refused before the body is read; see `Admission.check`."""
        self._admission.check(name, incarnation)

    def contribution(self, head: PushHead) -> Contribution:
        """Return memory for a push's gradients; see `Contribution` and `SessionState` for what they refuse."""
        self._state.check_evaluation(head.evaluation)
        layout, rule = self.layout_at(head.name), self.plan.rule
        return Contribution(layout, head.segments, head.sparse, rule, self.groups, head.wire_gradients, head.order)

    def push(self, head: PushHead, contribution: Contribution, fingerprint: str, now: float) -> Outcomes:
        """Take a complete push in and return every outcome it decides; none under its own name means that it waits.

        Args:
            fingerprint: identifies the body, so that a retry is told from another content under the same name.
            now: monotonic seconds.

        Raises:
            FarstepError: the push is refused; nothing has changed and its sequence is free.
            StepInterrupted: a kernel failed midway; the step is finished before anything else happens.
        """
        outcomes = self._pushes.finish()
        self._admission.check(head.name, head.incarnation)
        if (repeated := self._repeated(head.name, fingerprint, now)) is not None:
            return outcomes | repeated
        if self._rounds.holds(head.name, fingerprint):
            return outcomes
        nonfinite = self._admission.check_push(head, contribution)
        self._pushes.check(contribution, head.name.worker)
        self._rounds.heard(head.name.worker, now)
        return outcomes | self._pushes.offer(head, contribution, fingerprint, now, nonfinite=nonfinite)

    def _repeated(self, name: WriteName, fingerprint: str, now: float) -> Outcomes | None:
        """Return the outcome of a write that was committed before, whose worker is alive; None for one that is next."""
        receipt = self._ledger.judge(name, fingerprint)
        if receipt is None:
            return None
        self._rounds.heard(name.worker, now)
        return {name: Outcome(receipt, duplicate=True)}

    def tick(self, now: float) -> Outcomes:
        """Let time decide: leases run out, and whoever waits longer than its mode's deadline is answered."""
        outcomes: Outcomes = {}
        with suppress(StepInterrupted):  # it stays unfinished until somebody asks again
            outcomes = self._pushes.finish()
        return outcomes | self._pushes.tick(now)

    def intake(self, head: PutHead) -> Contents:
        """Return memory for new contents; see `SessionState.intake` for what it refuses."""
        return self._state.intake(head, self.layout_at(head.name))

    def put(self, head: PutHead, contents: Contents, fingerprint: str, now: float) -> Outcomes:
        """Replace contents of the session in one step; their memory belongs to the session from now on."""
        outcomes = self._pushes.finish()
        self._admission.check(head.name, head.incarnation)
        if (repeated := self._repeated(head.name, fingerprint, now)) is not None:
            return outcomes | repeated
        if head.name.worker in self._rounds:
            raise mismatch(head.name)
        receipt = self._state.put(head, contents)
        self._ledger.commit(head.name, fingerprint, receipt)
        self.received(head.name.worker, head.name.epoch, now)
        return outcomes | {head.name: Outcome(receipt)}

    # -- growing ----------------------------------------------------------------------------------------------------

    def addition(self, head: AppendHead) -> Contents:
        """Return memory for the parameters of a new group.

        Raises:
            SessionLost, Fenced, SequenceGap, NotInitialised: see `check`.
            InvalidOption, TensorMismatch, LimitExceeded, OptionsDiffer: see `Growth.append`.
        """
        if self._admission.is_new(head.name, head.incarnation):
            self._growth.check(self.plan, head)
        return room_for(self.plan, head)

    def grows(self, head: AppendHead) -> bool:
        """Say whether a group is new, so that it needs room: neither seen before nor there already."""
        return self._admission.is_new(head.name, head.incarnation) and head.group == len(self.plan.groups)

    def append(self, head: AppendHead, arrived: Contents, fingerprint: str, now: float) -> Outcomes:
        """Grow by a param group as one new version, or note that a worker knows a group that is there.

        Every other worker is shut out until it adds the same group, and its push that waits is taken back.

        Raises:
            FarstepError: see `Growth.append`; nothing has changed then.
        """
        outcomes = self._pushes.finish()
        self._admission.is_new(head.name, head.incarnation)
        if (repeated := self._repeated(head.name, fingerprint, now)) is not None:
            return outcomes | repeated
        if head.name.worker in self._rounds:
            raise mismatch(head.name)
        groups = len(self.plan.groups)
        receipt = self._growth.append(self.plan, head, arrived)
        if len(self.plan.groups) > groups:
            outcomes |= self._attendance.added(head, self.workers, now)
        self._ledger.commit(head.name, fingerprint, receipt)
        self.received(head.name.worker, head.name.epoch, now)
        return outcomes | {head.name: Outcome(receipt)}

    # -- options ----------------------------------------------------------------------------------------------------

    def set_groups(self, changes: GroupChanges) -> Outcomes:
        """Change options of param groups, effective from the next step on.

        Raises:
            InvalidOption: an unknown group or option, or a value of a wrong type, out of range, or with which no step
                could be taken; nothing has changed then.
        """
        outcomes = self._pushes.finish()
        self._state.set_groups(self._state.given(changes))
        return outcomes

    # -- reads ------------------------------------------------------------------------------------------------------

    def hold(self) -> tuple[Held, Outcomes]:
        """Hold the current version, which nobody changes until it is released."""
        outcomes = self._pushes.finish()
        return self._state.hold(), outcomes

    def copy(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> tuple[Contents, Outcomes]:
        """Copy fields of the current version, of some segments or of all."""
        outcomes = self._pushes.finish()
        return self._state.copy(fields, indices), outcomes

    def snapshot(self) -> tuple[Snapshot, Outcomes]:
        """Copy all of the current version; what waits at a barrier is not part of it."""
        outcomes = self._pushes.finish()
        return self._state.snapshot(), outcomes

    def restore(self, snapshot: Snapshot) -> None:
        """Begin with a snapshot of a session with this plan, which is in no worker's way yet.

        Raises:
            TensorMismatch: a state that no session can have.
        """
        self._state.restore(snapshot)
