"""What a coordinator knows, and what it refuses: a request that one of the checks refuses leaves no trace."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from farstep.errors import FarstepError, Fenced, SessionLost, StateRolledBack
from farstep.protocol.consistency import Consistency
from farstep.protocol.growth import outgrown
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator.events import Append, Push, Put
from farstep_service.coordinator.instructions import Awaited
from farstep_service.coordinator.member import Member, RosterState, mismatch
from farstep_service.coordinator.modes.decisions import Refuse, Skip, Step
from farstep_service.coordinator.modes.table import mode_for
from farstep_service.coordinator.roster import Roster


@dataclass(frozen=True, slots=True)
class Running:
    """The instruction whose result is awaited.

    Attributes:
        cause: the writes that led to it.
        decision: what the mode decided about pushes; None for other writes.
        unfinished: its kernel failed midway, and its workers have been told so.
    """

    instruction: Awaited
    cause: tuple[Push | Put | Append, ...]
    decision: Step | Skip | Refuse | None = None
    unfinished: bool = False


@dataclass(slots=True)
class CoordinatorState:
    """All that a coordinator knows.

    Attributes:
        session: its name.
        incarnation: a name for this life of its ledger; a write of another one is refused.
        consistency: how pushes become steps.
        switched: it was created with another mode, or has been in one.
        version: the count of committed writes that changed the contents.
        initialised: the first contents have arrived.
        initialiser: the worker that is asked for them, and until when; None for none.
        roster: who takes part.
        mode: what the state machine of the mode knows.
        waiting: by worker, its push that waits.
        running: the instruction that is being carried out; None between two events, unless it is unfinished.
        predecessors: the lives of the ledger before this one, of which steps that were acknowledged are lost.
    """

    session: str
    incarnation: str
    consistency: Consistency
    switched: bool = False
    version: int = 0
    initialised: bool = False
    initialiser: tuple[str, float] | None = None
    roster: RosterState = field(default_factory=RosterState)
    mode: Any = None
    waiting: dict[str, Push] = field(default_factory=dict)
    running: Running | None = None
    predecessors: tuple[str, ...] = ()


class Checks:
    """Know one session, and refuse what cannot happen to it; the base of `Coordinator`.

    Args:
        state: what it begins with; it belongs to the coordinator from then on.
    """

    def __init__(self, state: CoordinatorState) -> None:
        self._state = state
        mode = state.consistency
        self.roster = Roster(mode.places, mode.lease_s, state.roster)
        self._mode = mode_for(mode, self.roster, state.mode)
        self._waiting = state.waiting
        self._due: float | None = None  # when leases lapsed and nothing was decided since

    @property
    def state(self) -> CoordinatorState:
        """Return all that it knows."""
        return replace(self._state, roster=self.roster.state, mode=self._mode.state)

    @property
    def version(self) -> int:
        """Return the count of committed writes that changed the contents."""
        return self._state.version

    @property
    def initialised(self) -> bool:
        """Return whether the first contents have arrived."""
        return self._state.initialised

    @property
    def switched(self) -> bool:
        """Return whether the session has been in another mode."""
        return self._state.switched

    @property
    def unfinished(self) -> bool:
        """Return whether an instruction has to be carried out to its end before anything else happens."""
        return self._state.running is not None and self._state.running.unfinished

    @property
    def deadline(self) -> float | None:
        """Return the time at which `Tick` may have something to decide; None for none, or while one is unfinished."""
        if self._state.running is not None:
            return None
        return self._mode.deadline if self._due is None else self._due

    @property
    def keeps_bases(self) -> bool:
        """Return whether versions that workers have received are kept."""
        return bool(self._state.consistency.delay_compensation)

    def waits(self, worker: str) -> bool:
        """Return whether a push of a worker waits."""
        return worker in self._waiting

    def initialises(self, worker: str) -> bool:
        """Return whether a worker is the one that is asked for the first contents."""
        chosen = self._state.initialiser
        return not self._state.initialised and chosen is not None and chosen[0] == worker

    # -- checks: what is refused leaves no trace --------------------------------------------------------------------

    def check_worker(self, worker: str, epoch: int, incarnation: str) -> Member:
        """Return the record of a worker that is of this life of the session, and whose epoch is not over.

        Raises:
            SessionLost, Fenced: it is not.
        """
        if incarnation != self._state.incarnation:
            raise self._other_life(worker, incarnation)
        return self.roster.check(worker, epoch)

    def check_write(self, name: WriteName, incarnation: str) -> None:
        """Refuse a write that can be refused before its body is read.

        Raises:
            SessionLost, Fenced, SequenceGap, ReceiptExpired: it belongs to another life of the session, is not next, or
                its worker does not know all groups.
        """
        if self.seen(name, incarnation, None) is None and (error := self.outgrown(name.worker)):
            raise error

    def admit(self, name: WriteName, incarnation: str, fingerprint: str) -> Receipt | None:
        """Return the receipt of a push or put that was committed before, None for one that may happen now.

        Raises:
            SessionLost, Fenced, SequenceGap, IdempotencyMismatch, ReceiptExpired: see `seen` and `check_write`.
        """
        receipt = self.seen(name, incarnation, fingerprint)
        if receipt is None and (error := self.outgrown(name.worker)):
            raise error
        return receipt

    def is_new(self, name: WriteName, incarnation: str) -> bool:
        """Return whether a write is next; for errors see `seen`."""
        return self.seen(name, incarnation, None) is None

    def seen(self, name: WriteName, incarnation: str, fingerprint: str | None) -> Receipt | None:
        """Return the receipt of a write that was committed before, None for one that is next.

        Raises:
            SessionLost, Fenced, SequenceGap, IdempotencyMismatch, ReceiptExpired: see `Roster.judge`.
        """
        if incarnation != self._state.incarnation:
            raise self._other_life(name.worker, incarnation)
        return self.roster.judge(name, fingerprint)

    def holds(self, name: WriteName, fingerprint: str) -> bool:
        """Return whether a push waits already.

        Raises:
            IdempotencyMismatch: its worker has another one waiting.
        """
        earlier = self._waiting.get(name.worker)
        if earlier is not None and earlier.fingerprint != fingerprint:
            raise mismatch(name)
        return earlier is not None

    def check_nothing_waits(self, name: WriteName) -> None:
        """Refuse another write than the push of its worker that waits.

        Raises:
            IdempotencyMismatch: there is one.
        """
        if name.worker in self._waiting:
            raise mismatch(name)

    def check_join(self, worker: str, now: float) -> None:
        """Refuse a worker for which there is no place.

        Raises:
            SessionFull: the mode's places are taken by workers that are live.
        """
        self.roster.make_room(worker, now)

    def check_mode(self, mode: Consistency, now: float) -> None:
        """Refuse a mode that has no place for every live worker.

        Raises:
            SessionFull: it has fewer.
        """
        self.roster.surplus(mode.places, now)

    def outgrown(self, worker: str) -> Fenced | None:
        """Return the error for a worker that does not know all groups, None for one that does."""
        lag = self.roster.lag(worker)
        return None if lag is None else outgrown(self._state.session, worker, lag[0], by=lag[1])

    def _other_life(self, worker: str, incarnation: str) -> FarstepError:
        if incarnation in self._state.predecessors:
            return rolled_back(self._state.session, self._state.version)
        return SessionLost(
            f"Session {self._state.session!r} was created anew since worker {worker!r} joined it.",
            remedy="Call rejoin() to take on what it holds now, which is another training's unless it was imported "
            "from a file.",
            field="incarnation",
        )


def rolled_back(session: str, version: int) -> StateRolledBack:
    """Return what workers of an earlier life of a session are told."""
    return StateRolledBack(
        f"Session {session!r} was rolled back to version {version}: the server ended before the steps after it were "
        "kept, or they were undone.",
        remedy="Call rejoin() to go on from there, or create the optimizer with on_rollback='accept'.",
        field="incarnation",
        version=version,
    )
