"""What a session refuses before anything has changed: writes of another life, out of turn, or wrong in themselves.

What is refused leaves no trace, and its sequence is not consumed.
"""

from __future__ import annotations

from typing import final

from farstep.errors import SessionLost
from farstep.messages import PushHead, WriteName
from farstep_service.coordinator import Ledger
from farstep_service.gradients import Contribution, check_finite, nonfinite_in
from farstep_service.session.membership import Membership
from farstep_service.tensors.state import SessionState


@final
class Admission:
    """Check the writes of one session.

    Args:
        incarnation: the session's life.
        state: what the writes are for.
        ledger: which write of each worker is next.
        membership: which param groups each worker knows.
    """

    def __init__(self, incarnation: str, state: SessionState, ledger: Ledger, membership: Membership) -> None:
        self._incarnation = incarnation
        self._state = state
        self._ledger = ledger
        self._membership = membership

    def check(self, name: WriteName, incarnation: str) -> None:
        """Refuse what can be refused before the body is read.

        Raises:
            SessionLost, Fenced, SequenceGap: the write belongs to another life of the session, is not next, or its
                worker does not know all groups.
        """
        if self.is_new(name, incarnation) and (error := self._membership.outgrown(name.worker)):
            raise error

    def is_new(self, name: WriteName, incarnation: str) -> bool:
        """Say whether a write has not been seen before.

        Raises:
            SessionLost, Fenced, SequenceGap: it belongs to another life of the session, or is not next.
        """
        self._check_life(name.worker, incarnation)
        return self._ledger.judge(name, None) is None

    def check_worker(self, worker: str, epoch: int, incarnation: str) -> None:
        """Refuse a worker that writes nothing, and is of another life of the session or of an epoch that is over.

        Raises:
            SessionLost, Fenced: it is.
        """
        self._check_life(worker, incarnation)
        self._ledger.check(worker, epoch)

    def _check_life(self, worker: str, incarnation: str) -> None:
        if incarnation != self._incarnation:
            raise SessionLost(
                f"Session {self._state.plan.name!r} was created anew since worker {worker!r} joined it.",
                remedy="Call rejoin() to take on what it holds now, which is another training's unless it was imported "
                "from a file.",
                field="incarnation",
            )

    def check_push(self, head: PushHead, contribution: Contribution) -> str:
        """Refuse a push that no step can take; return what in it holds NaN or Inf where that skips the step, or "".

        Raises:
            NotInitialised, InvalidRequest, InvalidOption, TensorMismatch, NonFinite: as `SessionState`, `Contribution`
                and `check_finite` say.
        """
        self._state.check_initialised()
        self._state.check_base(head.base, head.evaluation)
        options = self._state.whole if head.options == "push" else self._state.changed
        options(head.groups)  # refuses what is wrong with them
        contribution.check_indices()
        policy = self._state.plan.nonfinite
        if self._state.plan.looks_at_gradients:
            contribution.secure_()
        if policy == "refuse":
            check_finite(contribution, head.name.worker, head.evaluation)
        elif policy == "skip":
            nonfinite = nonfinite_in(contribution, head.name.worker)[1]
            return nonfinite and f"{nonfinite}."
        return ""
