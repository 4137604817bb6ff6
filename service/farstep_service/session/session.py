"""The single writer of one session: what a coordinator decides and tensors carry out, put together.

    a request ──► checks: refused, seen before, waits already?  ──► an event ──► coordinator ──► instructions
                                                                       ▲                              │
                                                                       └── result ◄── tensors ◄───────┤
                                                                                                      ▼
                                                                                          an answer to each write

A session is plain and synchronous: its host calls one method at a time. Nothing here knows HTTP, threads or clocks; the
time comes in with the call. A request that is refused leaves no trace: no sequence is consumed, and no lease renewed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import final

import torch

from farstep.errors import NotDurable, StepInterrupted
from farstep.protocol.consistency import Consistency
from farstep.protocol.growth import AppendHead
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator import Coordinator, CoordinatorState, Event, Result, events
from farstep_service.coordinator.written import read_back
from farstep_service.kernels.kernel import KernelSource
from farstep_service.layout import Layout
from farstep_service.plan import Plan
from farstep_service.session.facts import SessionFacts
from farstep_service.session.growth import grown, room_for
from farstep_service.session.state_machine import Journal, Outcome, Outcomes, SessionRecord
from farstep_service.store import Buffers, Held
from farstep_service.tensors import Snapshot, Tensors, state_of
from farstep_service.tensors.contents import Contents
from farstep_service.tensors.contribution import Contribution
from farstep_service.tensors.payload import Payload, fill
from farstep_service.tensors.state import GroupChanges


@final
class Session(SessionFacts):
    """Order the writes of one session.

    Args:
        plan: what the session is.
        incarnation: a name for this life of the session, random hex.
        kernels: runs the update rules.
        device: where parameters and state live.
        journal: called with each event before it is applied, and with each result.
        record: what another session was, which this one goes on with.

    Attributes:
        late: outcomes of writes that were decided about on the occasion of something else; who tells them clears it.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        incarnation: str,
        kernels: KernelSource,
        device: str,
        journal: Journal | None = None,
        record: SessionRecord | None = None,
    ) -> None:
        self.incarnation = incarnation
        if record is None:
            tensors = Tensors(state_of(plan, kernels=kernels, device=torch.device(device)))
            coordinator = Coordinator(CoordinatorState(plan.name, incarnation, plan.consistency))
        else:
            tensors = Tensors.of(record.tensors, kernels=kernels, device=torch.device(device))
            coordinator = Coordinator(read_back(record.written))
        super().__init__(coordinator, tensors, journal)

    def record(self, *, pushes: bool = True) -> SessionRecord:
        """Return all that the session is; see `StateMachine.record`."""
        return self._machine.record(pushes=pushes)

    def replay(
        self,
        event: Event | Result,
        now: float,
        results: Sequence[Result],
        until: Callable[[int], bool] | None = None,
        *,
        reference: bool = False,
    ) -> Outcomes:
        """Let an event of a journal happen again; see `StateMachine.replay`.

        Args:
            until: ends the replay, in the middle of an event if need be; see `StateMachine`.
            reference: with the reference kernel, whatever ran then.
        """
        machine = self._machine
        machine.until, machine.reference = until, reference
        try:
            return machine.replay(event, now, results)
        finally:
            machine.until, machine.reference = None, False

    def begin_anew(self, incarnation: str, predecessors: tuple[str, ...], *, name: str | None = None) -> None:
        """Go on as another life of the session: acknowledged steps were lost or undone, or this is a fork.

        No worker of a life before is a member of it, and no push of one waits.

        Args:
            incarnation: the name of this life.
            predecessors: those of the lives before it, whose workers are told that the state was rolled back.
            name: the session's name from now on; None for the one it has.
        """
        before = self._coordinator.state
        if name is not None:
            self._state.plan = replace(self._state.plan, name=name)
        self._state.ask_again(None)
        state = CoordinatorState(
            before.session if name is None else name,
            incarnation,
            before.consistency,
            before.switched,
            initialised=before.initialised,
            version=self._state.version,
            predecessors=predecessors,
        )
        self.incarnation = incarnation
        self._tensors.forget_workers()
        self._coordinator = self._machine.coordinator = Coordinator(state)

    def arrive(self, head: PushHead | PutHead | AppendHead, payload: Payload | None, memory: memoryview) -> None:
        """Receive what came with a write that is about to happen again.

        Args:
            payload: says what it is; None for nothing.
            memory: its bytes in the journal, which are not written to.

        Raises:
            TensorMismatch: they have another size than the head says.
        """
        if isinstance(head, PushHead):
            contribution = self.contribution(head, checked=True)
            contribution.fill_again(payload, memory)
            self._tensors.arrived.receive_push(head, contribution)
        elif isinstance(head, PutHead):
            contents = self.intake(head)
            fill(contents.allocate(), memory)
            self._tensors.arrived.receive_contents(head, contents)
        else:
            fill((contents := self.addition(head)).allocate(), memory)
            self._tensors.arrived.receive_group(head.name, contents, self._plan_with(head))

    def position(self, worker: str) -> tuple[int, int, bool]:
        """Return a worker's epoch (0: none), its last committed sequence, and whether a push of it waits."""
        self.late |= self._machine.finish()
        roster = self._coordinator.roster
        return roster.epoch(worker), roster.sequence(worker), self._coordinator.waits(worker)

    def forget_base(self) -> bool:
        """Let the oldest of the versions go that workers have; return whether there was one.

        A push that was computed on it is refused as stale, and answered with parameters to go on from.
        """
        if not self._coordinator.roster.bases():
            return False
        self._machine.happen(events.DropBase(), self._machine.now)
        return True

    # -- membership -------------------------------------------------------------------------------------------------

    def join(self, worker: str, now: float, *, named: bool = True) -> tuple[int, Outcomes]:
        """Open a new epoch of a worker that knows all groups, fencing its older one; return it, and what that decided.

        Args:
            named: its name was chosen; see `Member`.

        Raises:
            SessionFull: the mode's places are taken by workers that are live.
        """
        outcomes = self._machine.finish()
        self._coordinator.check_join(worker, now)
        outcomes |= self._machine.happen(events.Join(worker, named), now)
        return self._coordinator.roster.epoch(worker), outcomes

    def leave(self, worker: str, epoch: int, now: float) -> Outcomes:
        """Give a worker's place up; an epoch that is not current has nothing to give up."""
        outcomes = self._machine.finish()
        if not epoch or self._coordinator.roster.epoch(worker) != epoch:
            return outcomes
        return outcomes | self._machine.happen(events.Leave(worker), now)

    def received(self, worker: str, epoch: int, now: float) -> None:
        """Note that a worker is being sent the present version, if that is its epoch.

        A lease that has just begun, with the write that this answers, does not begin again.
        """
        coordinator = self._coordinator
        if not epoch or coordinator.roster.epoch(worker) != epoch:
            return
        if coordinator.keeps_bases or not coordinator.roster.is_fresh(worker, now):
            with suppress(NotDurable):  # parameters can be read while nothing can be written
                self._machine.happen(events.Receive(worker), now)

    def renew(self, worker: str, epoch: int, incarnation: str, now: float) -> tuple[bool, int]:
        """Renew a worker's lease without a write; return whether it had run out, and how many workers are live.

        Raises:
            SessionLost, Fenced: the worker joined another life of the session, or its epoch is over.
        """
        self._coordinator.check_worker(worker, epoch, incarnation)
        roster = self._coordinator.roster
        lapsed = not roster.is_live_at(worker, now)
        self._machine.happen(events.Heartbeat(worker), now)
        return lapsed, roster.live

    def set_consistency(self, mode: Consistency, now: float) -> Outcomes:
        """Go on in another mode, which is offered the pushes that wait in the order of their workers' names.

        Raises:
            SessionFull: there are more live workers than the mode has places for.
            InvalidOption: the optimizer does not go with the mode. Nothing has changed then, whatever the error.
        """
        outcomes = self._machine.finish()
        replace(self.plan, consistency=mode).check_consistency()
        self._coordinator.check_mode(mode, now)
        return outcomes | self._machine.happen(events.ChangeMode(mode), now)

    def interrupt(self, now: float) -> Outcomes:
        """Take back every push that waits, because the server is about to end."""
        return self._machine.happen(events.Interrupt(), now)

    def layout_at(self, name: WriteName) -> Layout:
        """Return the layout that a worker knew when it made a write: the session's, or what it was before it grew."""
        return self._layout(self._coordinator.roster.groups_at(name))

    def layout_of(self, worker: str) -> Layout:
        """Return the layout that a worker knows."""
        lag = self._coordinator.roster.lag(worker)
        return self._layout(None if lag is None else lag[0])

    def _layout(self, groups: int | None) -> Layout:
        plan = self._state.plan
        return plan.layout if groups is None or groups == len(plan.groups) else plan.layout.first(groups)

    # -- writes -----------------------------------------------------------------------------------------------------

    def check(self, name: WriteName, incarnation: str) -> None:
        """Refuse what can be refused before the body is read; see `Coordinator.check_write`."""
        self._coordinator.check_write(name, incarnation)

    def contribution(self, head: PushHead, *, checked: bool = False) -> Contribution:
        """Return memory for a push's gradients; see `Contribution` and `SessionState` for what they refuse.

        Args:
            checked: it was admitted before; options may have changed since.
        """
        state = self._state
        state.check_evaluation(head.evaluation)
        layout, rule = self._layout(self._coordinator.roster.groups_at(head.name)), state.plan.rule
        groups = None if checked else state.groups
        return Contribution(layout, head.segments, head.sparse, rule, groups, head.wire_gradients, head.order)

    def push(self, head: PushHead, contribution: Contribution, fingerprint: str, now: float) -> Outcomes:
        """Take a complete push in and return every outcome it decides; none under its own name means that it waits.

        Args:
            fingerprint: identifies the body: a retry has the same one, another content under the same name has not.
            now: monotonic seconds.

        Raises:
            FarstepError: the push is refused; nothing has changed and its sequence is free.
            StepInterrupted: a kernel failed midway; the step is finished before anything else happens.
        """
        outcomes, coordinator = self._machine.finish(), self._coordinator
        if (receipt := coordinator.admit(head.name, head.incarnation, fingerprint)) is not None:
            return outcomes | self._again(head.name, receipt, now)
        if coordinator.holds(head.name, fingerprint):
            return outcomes
        nonfinite = self._tensors.check_push(head, contribution)
        self._tensors.arrived.receive_push(head, contribution)
        decided = self._machine.happen(events.Push(head, fingerprint, nonfinite), now)
        return outcomes | decided if outcomes else decided

    def _again(self, name: WriteName, receipt: Receipt, now: float) -> Outcomes:
        """Return the outcome of a write that was committed before, whose worker is alive."""
        self._machine.happen(events.Heartbeat(name.worker), now)
        return {name: Outcome(receipt, duplicate=True)}

    def tick(self, now: float) -> Outcomes:
        """Apply the time: leases run out, and pushes that waited until their mode's deadline are answered."""
        outcomes: Outcomes = {}
        with suppress(StepInterrupted):  # it stays unfinished until the next request
            outcomes = self._machine.finish()
        if self._coordinator.unfinished:
            return outcomes
        return outcomes | self._machine.happen(events.Tick(), now)

    def intake(self, head: PutHead) -> Contents:
        """Return memory for new contents; see `SessionState.intake` for what it refuses."""
        return self._state.intake(head, self.layout_at(head.name))

    def put(self, head: PutHead, contents: Contents, fingerprint: str, now: float) -> Outcomes:
        """Replace contents of the session in one step; their memory belongs to the session from now on."""
        outcomes = self._machine.finish()
        if (receipt := self._coordinator.admit(head.name, head.incarnation, fingerprint)) is not None:
            return outcomes | self._again(head.name, receipt, now)
        self._coordinator.check_nothing_waits(head.name)
        self._tensors.arrived.receive_contents(head, contents)
        return outcomes | self._machine.happen(events.Put(head, fingerprint), now, raising=head.name)

    # -- growing ----------------------------------------------------------------------------------------------------

    def addition(self, head: AppendHead) -> Contents:
        """Return memory for the parameters of a new group.

        Raises:
            SessionLost, Fenced, SequenceGap: see `check`.
            NotInitialised, InvalidOption, TensorMismatch, LimitExceeded, OptionsDiffer: see `append`.
        """
        if self._coordinator.is_new(head.name, head.incarnation):
            self._plan_with(head)
        return room_for(self.plan, head)

    def grows(self, head: AppendHead) -> bool:
        """Return whether a group is new, so that it needs room: neither seen before nor there already."""
        return self._coordinator.is_new(head.name, head.incarnation) and head.group == len(self.plan.groups)

    def append(self, head: AppendHead, arrived: Contents, fingerprint: str, now: float) -> Outcomes:
        """Grow by a param group as one new version, or note that a worker knows a group that is there.

        Every other worker is shut out until it adds the same group, and its push that waits is taken back.

        Raises:
            NotInitialised: there is nothing yet that could grow.
            OptionsDiffer: there is such a group, with other options or parameters.
            InvalidOption, TensorMismatch, LimitExceeded: groups before it are missing, or it cannot be stored.
            Unavailable: there is no memory. Nothing has changed then, whatever the error.
        """
        outcomes = self._machine.finish()
        if (receipt := self._coordinator.seen(head.name, head.incarnation, fingerprint)) is not None:
            return outcomes | self._again(head.name, receipt, now)
        self._coordinator.check_nothing_waits(head.name)
        plan = self._plan_with(head)
        there = plan is self.plan
        if not there:
            self._tensors.arrived.receive_group(head.name, arrived, plan)
        return outcomes | self._machine.happen(events.Append(head, fingerprint, there), now, raising=head.name)

    def _plan_with(self, head: AppendHead) -> Plan:
        """Return the plan with a new group, or the present one if it has that group."""
        self._state.check_initialised()
        lag = self._coordinator.roster.lag(head.name.worker)
        known = len(self.plan.groups) if lag is None else lag[0]
        return grown(self.plan, head, known=known, in_force=self.groups)

    # -- options ----------------------------------------------------------------------------------------------------

    def set_groups(self, changes: GroupChanges) -> Outcomes:
        """Change options of param groups, effective from the next step on.

        Raises:
            InvalidOption: an unknown group or option, or a value of a wrong type, out of range, or with which no step
                could be taken; nothing has changed then.
        """
        outcomes = self._machine.finish()
        self._state.check_step(self._state.given(changes))
        return outcomes | self._machine.happen(events.ChangeOptions(changes), self._machine.now)

    # -- reads ------------------------------------------------------------------------------------------------------

    def hold(self) -> tuple[Held, Outcomes]:
        """Hold the current version, which stays unchanged until it is released."""
        outcomes = self._machine.finish()
        return self._state.hold(), outcomes

    def copy(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> tuple[Contents, Outcomes]:
        """Copy fields of the current version, of some segments or of all."""
        outcomes = self._machine.finish()
        return self._state.copy(fields, indices), outcomes

    def parameters(self) -> tuple[Buffers, Outcomes]:
        """Return the memory of the current version, to be copied before anything else is called."""
        outcomes = self._machine.finish()
        return self._state.parameters(), outcomes

    def snapshot(self) -> tuple[Snapshot, Outcomes]:
        """Copy all of the current version; what waits at a barrier is not part of it."""
        outcomes = self._machine.finish()
        return self._state.snapshot(), outcomes

    def restore(self, snapshot: Snapshot) -> None:
        """Begin with a snapshot of a session with this plan, which is in no worker's way yet.

        Raises:
            TensorMismatch: a state that no session can have.
        """
        self._state.restore(snapshot)
        before = self._coordinator.state
        self._coordinator = Coordinator(replace(before, initialised=True, version=self._state.version))
        self._machine.coordinator = self._coordinator
