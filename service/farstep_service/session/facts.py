"""What can be seen of a session without a turn of its own: nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence

from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import PushHead, WriteName
from farstep_service.coordinator import Coordinator
from farstep_service.plan import Plan
from farstep_service.session.state_machine import Journal, StateMachine
from farstep_service.store import Buffers
from farstep_service.tensors import Tensors
from farstep_service.tensors.contribution import Contribution
from farstep_service.tensors.payload import Payload


class SessionFacts:
    """The facts about one session.

    Args:
        coordinator, tensors: of the session.
        journal: see `StateMachine`.
    """

    def __init__(self, coordinator: Coordinator, tensors: Tensors, journal: Journal | None) -> None:
        self._machine = StateMachine(coordinator, tensors, journal)
        self._coordinator, self._tensors, self._state = coordinator, tensors, tensors.state
        self.late = self._machine.late

    @property
    def journal(self) -> Journal | None:
        """What events and results are written down with."""
        return self._machine.journal

    @journal.setter
    def journal(self, journal: Journal | None) -> None:
        self._machine.journal = journal

    def note_time(self, now: float) -> None:
        """Note the time at which the session goes on; its clock never goes back."""
        self._machine.now = max(self._machine.now, now)

    def give_up(self) -> None:
        """Give up the step that waits for an evaluation of its objective."""
        self._state.ask_again(None)

    def payload(self, name: WriteName) -> Payload | None:
        """Return the bytes that came with a write which is not decided about."""
        return self._tensors.arrived.payload(name)

    def waiting(self) -> list[tuple[PushHead, Payload | None]]:
        """Return the pushes that wait, and what came with each."""
        return self._tensors.arrived.waiting()

    def gradients(self, name: WriteName) -> Contribution | None:
        """Return what a push brought that is not decided about; not to be changed."""
        return self._tensors.arrived.gradients(name)

    def present(self) -> Buffers:
        """Return the memory of the present parameters, to be copied before anything else happens."""
        return self._state.parameters()

    @property
    def plan(self) -> Plan:
        """Return what the session is by now: it may have grown, and gone over to another mode."""
        return self._state.plan

    @property
    def initialised(self) -> bool:
        """Return whether the first parameters have arrived."""
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
    def keeps_bases(self) -> bool:
        """Return whether versions that workers have received are kept."""
        return self._coordinator.keeps_bases

    @property
    def switched(self) -> bool:
        """Return whether the session was told to go over to another mode."""
        return self._coordinator.switched

    @property
    def workers(self) -> list[str]:
        """Return the workers that joined, in the order of their names."""
        return self._coordinator.roster.names()

    @property
    def worker_count(self) -> int:
        """Return how many workers there are."""
        return len(self._coordinator.roster)

    def workers_after(self, worker: str, most: int) -> list[str]:
        """Return the first `most` of the workers whose names come after one."""
        return self._coordinator.roster.names_after(worker, most)

    @property
    def deadline(self) -> float | None:
        """Return the time at which `tick` may have something to decide."""
        return self._coordinator.deadline

    def nbytes(self) -> dict[str, int]:
        """Return the memory the session takes, in bytes by kind."""
        return {**self._state.nbytes(), "waiting": self._tensors.waiting_bytes}

    @property
    def held_bytes(self) -> int:
        """Return the memory that the session holds, but for gradients that wait, whose requests are in flight."""
        return self._state.held_bytes + self._tensors.kept_bytes

    def coming_bytes(self, growing: int = 0) -> int:
        """Return the bytes that the next write may take beside that; see `SessionState.coming_bytes`."""
        return self._state.coming_bytes(growing)

    def lease_s(self, worker: str, now: float) -> float:
        """Return how long a worker's lease still runs: all of it while a push of it waits, 0 for one not live."""
        return self._coordinator.roster.left_s(worker, now)

    def initialises(self, worker: str) -> bool:
        """Return whether a worker that joined is asked for the first contents."""
        return not self.initialised and self._coordinator.initialises(worker)
