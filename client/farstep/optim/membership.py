"""The session side of an optimizer: its link, and what the session has of its parameters, options and state.

    rebind      put other parameters in the place of some, and send their values and state
    settle      send what differs in a mapping that replaced the state
    prepare     before a step: send edits of state and parameters, and forget what was read of the state
    push        the step: send gradients and changed options, or that the step is skipped; receive new parameters

An optimizer has one membership at a time, and gets another one when it moves to another session.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from farstep.errors import FarstepError
from farstep.link import Link, SessionSpec, Start
from farstep.optim.away import Away
from farstep.optim.chosen import Chosen
from farstep.optim.gradient_dtypes import of_their_parameters
from farstep.optim.held_parameters import HeldParameters
from farstep.optim.options import Options, changes, without
from farstep.optim.overlap import Overlap
from farstep.optim.remote_state import RemoteState
from farstep.optim.scaling import NOT_SCALED, Scaling
from farstep.optim.torch_form import check_state_dtype, to_session
from farstep.optim.writers import Claim, Writing
from farstep.overlap import Overlapped
from farstep.protocol.fields import FieldKind, State
from farstep.protocol.messages import Evaluation
from farstep.protocol.receipt import StepReport
from farstep.settings import WorkerSettings

Parameters = Sequence[Tensor]
OpenLink = Callable[[SessionSpec, Sequence[Tensor], WorkerSettings, Start], Link]
InitialState = Callable[[Tensor, Mapping[str, FieldKind]], State | None]
"""Given a parameter and the state fields, returns its initial state, None where the first step creates the state."""


@final
class Membership:
    """An optimizer's part in its session.

    Args:
        spec: describes the session.
        groups: the parameters of each of the optimizer's groups.
        chosen: which of them the session holds.
        settings: the worker's.
        opened_by: opens the link to the session.
        initial_state: returns the initial state of a parameter.
        param_groups: returns the optimizer's groups.
        state: torch's form of the state that a new session begins with, None for none.
        version: the version that a new session begins at.
        options: returns the groups' present options, for pushes that begin before their step; None for no such pushes.

    Attributes:
        held: the parameters that the session holds.
        shown: the view whose values the parameters have at the moment; "" if they have their own.
        taken: the options in force in a session that existed before, which the groups have to take; None for none.
        fits: whether the optimizer's parameters were those of the session at the last check.
        scaler: the scaler to inform of steps that are skipped for Inf or NaN.

    Raises:
        FarstepError: the session cannot be joined.
    """

    def __init__(
        self,
        spec: SessionSpec,
        groups: Sequence[Parameters],
        chosen: Chosen,
        settings: WorkerSettings,
        *,
        opened_by: OpenLink,
        initial_state: InitialState,
        param_groups: Callable[[], Sequence[Mapping[str, Any]]],
        state: Mapping[Any, Any] | None = None,
        version: int = 0,
        options: Callable[[], list[Options] | None] | None = None,
    ) -> None:
        self.settings = settings
        self._optimizer = spec.optimizer
        self.parameters = list(chosen.parameters)
        self._described = chosen.described
        self._initial_state = initial_state
        self._claim = Claim()
        if settings.server is not None and not settings.private:  # joining brings the session's parameters
            self._claim.take(self.parameters)
        self.link = opened_by(spec, self.parameters, settings, self._start(state, version))
        self._sent: list[Options] = [dict(group) for group in spec.groups]
        self.taken = self._in_force(self._sent)
        self._sent = self.taken or self._sent
        self.overlap = None
        if options is not None:
            self.overlap = Overlap(self.parameters, partial(_begin_push, weakref.ref(self), options))
        self.close = weakref.finalize(self, _leave, self.link, self.overlap, self._claim)
        self.state = RemoteState(
            self.link, self.parameters, partial(_check_open, self.close, settings.session), param_groups
        )
        self._writes_to: tuple[list[int], frozenset[int]] = [], frozenset()
        self._remember(groups, chosen)
        self.shown = ""
        self.scaler: torch.amp.GradScaler | None = None

    # -- the parameters ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse to continue after `close`.

        Raises:
            FarstepError: the session was left.
        """
        _check_open(self.close, self.settings.session)

    def check_training(self, what: str) -> None:
        """Refuse an operation that would take the values of a view for the parameters' own.

        Raises:
            FarstepError: the parameters have a view's values at the moment.
        """
        if self.shown:
            raise unusable(
                f"{what} inside swap_to({self.shown!r}): the parameters have the values of that view, not their own.",
                "Leave the `with` block first.",
            )

    def _remember(self, groups: Sequence[Parameters], chosen: Chosen, away: Away | None = None) -> None:
        """Take the groups' parameters for those of the session; `away` are those that are away."""
        self.fits = True
        self.state.hold_(self.parameters)
        self._described = chosen.described
        self.held = HeldParameters(
            groups,
            chosen,
            self.parameters,
            away,
            stand_in=None if self._optimizer == "LBFGS" else self.link.stand_in,
            lone=self.settings.private,
        )

    def holds(self, groups: Sequence[Parameters]) -> bool:
        """Return whether these are the session's parameters, group by group, in the memory they had."""
        self.fits = self.held.match(groups)
        return self.fits

    def leave_out_away_(self, groups: Sequence[Parameters]) -> bool:
        """Go on without parameters that are away; return whether nothing else differs from what the session has."""
        away = self.held.newly_away(groups)
        if away is None or not self.link.rebind(away.parameters):
            return False
        self.held.away.settle_(away)
        self.parameters = away.parameters
        self._remember(groups, self.held.chosen, away)
        return True

    @property
    def sends_nothing_early(self) -> bool:
        """Return whether the step could refuse gradients, so that none is sent before it."""
        return bool(self.held.chosen.ties)

    def rebind(self, groups: Sequence[Mapping[str, Any]], chosen: Chosen) -> bool:
        """Put parameters that fit in the place of others; return whether the link can. Otherwise nothing changes.

        They bring their own values. A parameter that has an entry in `state` brings that state, one without starts
        anew, and the state of a replaced parameter stays in `state`.
        """
        away = self.held.away_among(chosen)
        brought = self.state.brought(chosen.parameters)
        if not self.link.rebind(away.parameters):
            return False
        self.held.away.settle_(away)
        self.parameters = away.parameters
        self._write_state(brought)
        self.state.rebind_(chosen.parameters, brought)
        self._remember([group["params"] for group in groups], chosen, away)
        if self.overlap is not None:
            self.overlap.watch(chosen.parameters)
        return True

    def writing(self) -> Writing:
        """Return a block that excludes other threads and, with a server, other processes from the parameters.

        Raises:
            FarstepError: another one is stepping on them; see `farstep.optim.writers`.
        """
        remote = self.settings.server is not None
        if self._writes_to[0] is not self.held.addresses:
            if remote:
                self._claim.take(self.parameters)
            addresses = self.held.addresses
            self._writes_to = addresses, frozenset(filter(None, addresses))
        return Writing(self._writes_to[1], waits=remote and self.link.consistency.waits_for_others)

    # -- steps ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Send edits of state and parameters, and forget what was read of the state: the next step changes it.

        The parameters are those of the session, as `holds` has just returned.

        Raises:
            TensorMismatch: a session cannot apply a gradient as torch would; nothing was sent.
        """
        self.held.chosen.check_step(self.held.every)
        self._send_state()
        self.link.settle_edits(self.held.addresses)

    def push(
        self, options: list[Options], scaling: Scaling = NOT_SCALED, evaluation: Evaluation | None = None
    ) -> StepReport:
        """Send the gradients, unless they overflowed, and changed options; receive the new parameters."""
        changed = self._named(options)
        gradients = [p.grad for p in self.parameters]
        try:
            if scaling.overflowed:
                report = self.link.skip(changed)
            else:
                unscaled = scaling.unscaled(gradients)
                own = of_their_parameters(
                    self._optimizer, self.held.chosen.described, self.held.dtypes, options, unscaled
                )
                report = self.link.push(own, changed, evaluation)
        except BaseException:
            self._sent = without(self._sent, changed)
            raise
        scaling.settle_(gradients)
        self._sent = options
        if self.overlap is not None:
            self.overlap.stepped(gradients, report)
        if report.disagreement:
            warnings.warn(
                f"Workers of session {self.settings.session!r} step with different options: {report.disagreement}",
                stacklevel=2,
            )
        return report

    def _named(self, options: list[Options]) -> Mapping[int, Options]:
        """Return the options to send with a push: those that changed, or all where each push has its own."""
        if self.settings.options == "push":
            return dict(enumerate(options))
        return changes(options, self._sent)

    def _in_force(self, named: Sequence[Options]) -> list[Options] | None:
        """Return the options that the session had in force when it was joined, of those named here."""
        joined = self.link.joined_options
        if joined is None or self.settings.options == "push":
            return None
        return [{key: now.get(key, own[key]) for key in own} for now, own in zip(joined, named, strict=True)]

    def pull(self) -> int:
        """Send edits of the state, update the parameters to the session's current version, and return it."""
        self._send_state()
        return self.link.pull()

    def append(self, options: Options, groups: Sequence[Parameters], chosen: Chosen) -> Options | None:
        """Add the last of these groups to the session.

        If another worker has added it before, parameters and state are the session's from now on. Return the options
        that the group then has to take, None if there are none.
        """
        taken: Options | None = None
        count = len(self.parameters)
        described, parameters = chosen.described[count:], chosen.parameters[count:]
        if not self.link.append(options, described, parameters):
            self.state.forget_()
            if self.settings.options != "push":
                with suppress(FarstepError):  # the group is there; the next step sends what differs
                    now = self.link.options_in_force()[self.held.group_count]
                    taken = options = {key: now.get(key, value) for key, value in options.items()}
        self.state.append_(parameters)
        self._sent = [*self._sent, options]
        self.parameters = [*self.parameters, *parameters]
        self._remember(groups, chosen, self.held.away)
        if self.overlap is not None:
            self.overlap.watch(chosen.parameters)
        return taken

    def rejoin(self, state: Mapping[Any, Any] | None, version: int) -> bool:
        """Join the session again; return whether it had to be created, from this state and at this version."""
        named = self._sent
        self._sent = [{} for _ in named]  # the session has the options of its creation, or of others
        created = self.link.rejoin(self._start(state, version))
        self.taken = self._in_force(named) if self.settings.options == "session" and not created else None
        self._sent = self.taken or self._sent
        return created

    # -- the state --------------------------------------------------------------------------------------------------

    def settle(self, state: Mapping[Any, Any]) -> None:
        """Send what differs in a mapping that replaced the state."""
        if state is not self.state:
            changed = self.state.differences(state)
            self._write_state(changed)
            self.state.settle_(state, changed)

    def refresh(self) -> None:
        """Send edits of the state, and forget what was read if others have changed the session."""
        if edits := self.state.edits():
            self._write_state(edits)
            self.state.forget_()
        self.state.refresh_()

    def _send_state(self) -> None:
        self._write_state(self.state.edits())
        self.state.forget_()

    def _write_state(self, changed: Mapping[int, State | None]) -> None:
        """Send the state of some parameters; one whose state was removed gets its initial state.

        Raises:
            TensorMismatch: the state has another dtype than the session's parameter; nothing was sent.
        """
        if changed:
            fields = self.link.fields
            for i, own in changed.items():
                check_state_dtype(self._described[i].name, self.parameters[i], own, fields)
            self.link.write(
                state={i: own or self._initial_state(self.parameters[i], fields) for i, own in changed.items()}
            )

    def _start(self, state: Mapping[Any, Any] | None, version: int) -> Start:
        """Return the state and version that a session begins with."""
        if state is None:
            return Start(None, version)

        def states(fields: Mapping[str, FieldKind]) -> list[State | None]:
            own = [to_session(p, state.get(p) or {}, fields) for p in self.parameters]
            for described, p, each in zip(self._described, self.parameters, own, strict=True):
                check_state_dtype(described.name, p, each, fields)
            return [each or self._initial_state(p, fields) for p, each in zip(self.parameters, own, strict=True)]

        return Start(states, version)


def _begin_push(
    member: weakref.ref[Membership], options: Callable[[], list[Options] | None], order: Sequence[int]
) -> Overlapped | None:
    """Begin a push with the options that its step would send."""
    membership, now = member(), options()
    if membership is None or now is None or not membership.close.alive or membership.sends_nothing_early:
        return None
    return membership.link.begin_push(order, membership._named(now))


def _leave(link: Link, overlap: Overlap | None, claim: Claim) -> None:
    claim.release()
    if overlap is not None:
        overlap.close()
    link.close()


def unusable(what: str, remedy: str) -> FarstepError:
    """Return the error for an operation that an optimizer refuses."""
    return FarstepError(what, remedy=remedy, side="client")


def _check_open(closing: weakref.finalize[..., Any], session: str) -> None:
    if not closing.alive:
        raise unusable(
            f"This optimizer was closed; it has left session {session!r}.",
            "Close it after its last use, or make a new one.",
        )
