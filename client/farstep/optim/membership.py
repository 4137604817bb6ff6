"""The session side of an optimizer: its link, and what the session has of the parameters, options and state here.

    settle      a mapping that stands in the state's place: what differs is sent
    prepare     before a step: edits of state and parameters are sent, and what was read of the state is forgotten
    push        the step: gradients and changed options there, new parameters back

An optimizer has one membership at a time; one that goes to another session gets another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor

from farstep.errors import FarstepError
from farstep.fields import FieldKind
from farstep.link import SessionSpec, Start, State, StepReport, open_link
from farstep.messages import Evaluation
from farstep.optim.edits import Edits
from farstep.optim.options import Options, changes, without
from farstep.optim.state import RemoteState
from farstep.optim.torch_form import to_session
from farstep.settings import Place

Newborn = Callable[[Tensor, Mapping[str, FieldKind]], State | None]
"""Given a parameter and the state fields, returns the state it begins with, None where state begins with a step."""


@final
class Membership:
    """What an optimizer has in its session.

    Args:
        spec: what the session is.
        parameters: its parameters, in order.
        place: where it is.
        newborn: the state that a parameter begins with.
        state: torch's form of the state that a new session begins with, None for none.
        version: the version that a new session begins at.

    Raises:
        FarstepError: the session cannot be had.
    """

    def __init__(
        self,
        spec: SessionSpec,
        parameters: Sequence[Tensor],
        place: Place,
        *,
        newborn: Newborn,
        state: Mapping[Any, Any] | None = None,
        version: int = 0,
    ) -> None:
        self.place = place
        self.parameters = list(parameters)
        self._newborn = newborn
        self._sent: list[Options] = [dict(group) for group in spec.groups]
        self.link = open_link(spec, self.parameters, place, self._start(state, version))
        self.close = weakref.finalize(self, self.link.close)
        self.state = RemoteState(self.link, self.parameters, partial(_check_open, self.close, place.session))
        self._edits = None if self.link.sees_edits else Edits(self.parameters)

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Refuse to go on after `close`, or with other parameters.

        Raises:
            FarstepError: the session was left, or these are not its parameters.
        """
        _check_open(self.close, self.place.session)
        if list(map(id, parameters)) != list(map(id, self.parameters)):
            raise refused(
                "A parameter in a group was replaced, added or removed; the session has those of the constructor.",
                "Make a new optimizer for the new parameters.",
            )

    # -- steps ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Send edits of state and parameters; forget what was read of the state, which the next step makes old."""
        self._send_state()
        if self._edits is not None and (edited := self._edits.found()):
            self.link.write(edited)
            self._edits.see_()

    def evaluate(self, options: list[Options], evaluation: Evaluation) -> StepReport:
        """Send one evaluation of the closure, after what was edited; bring the parameters of the next one back."""
        self.prepare()
        return self.push(options, evaluation)

    def push(self, options: list[Options], evaluation: Evaluation | None = None) -> StepReport:
        """Send the gradients and the options that changed; bring the new parameters back."""
        changed = changes(options, self._sent)
        try:
            report = self.link.push([p.grad for p in self.parameters], changed, evaluation)
        except BaseException:
            self._sent = without(self._sent, changed)
            raise
        self._sent = options
        self._have_seen()
        return report

    def pull(self) -> int:
        """Send edits of the state, bring the parameters to the session's current version, and return it."""
        self._send_state()
        version = self.link.pull()
        self._have_seen()
        return version

    def rejoin(self, state: Mapping[Any, Any] | None, version: int) -> bool:
        """Join the session again; return whether it had to be created anew, from this state and at this version."""
        self._sent = [{} for _ in self._sent]  # the session has the options of its creation, or of others
        created = self.link.rejoin(self._start(state, version))
        self._have_seen()
        return created

    def _have_seen(self) -> None:
        if self._edits is not None:
            self._edits.see_()

    # -- the state --------------------------------------------------------------------------------------------------

    def settle(self, state: Mapping[Any, Any]) -> None:
        """Bring a mapping that stands in the place of the state to the session."""
        if state is not self.state:
            changed = self.state.differences(state)
            self._write_state(changed)
            self.state.settle_(state, changed)

    def refresh(self) -> None:
        """Send edits of the state and forget what was read if others have taken the session on."""
        if edits := self.state.edits():
            self._write_state(edits)
            self.state.forget_()
        self.state.refresh_()

    def _send_state(self) -> None:
        self._write_state(self.state.edits())
        self.state.forget_()

    def _write_state(self, changed: Mapping[int, State | None]) -> None:
        """Send the state of some parameters; one whose state was taken away begins anew."""
        if changed:
            fields = self.link.fields
            self.link.write(state={i: own or self._newborn(self.parameters[i], fields) for i, own in changed.items()})

    def _start(self, state: Mapping[Any, Any] | None, version: int) -> Start:
        """Return what a session begins with."""
        if state is None:
            return Start(None, version)

        def states(fields: Mapping[str, FieldKind]) -> list[State | None]:
            return [to_session(p, state.get(p) or {}, fields) or self._newborn(p, fields) for p in self.parameters]

        return Start(states, version)


def refused(what: str, remedy: str) -> FarstepError:
    """Return the error for what an optimizer cannot do."""
    return FarstepError(what, remedy=remedy, side="client")


def _check_open(closing: weakref.finalize[..., Any], session: str) -> None:
    if not closing.alive:
        raise refused(
            f"This optimizer was closed; it has left session {session!r}.",
            "Close it after its last use, or make a new one.",
        )
