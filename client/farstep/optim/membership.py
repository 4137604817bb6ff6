"""The session side of an optimizer: its link, and what the session has of the parameters, options and state here.

    rebind      other parameters in the places of some: their values and state are sent
    settle      a mapping that stands in the state's place: what differs is sent
    prepare     before a step: edits of state and parameters are sent, and what was read of the state is forgotten
    push        the step: gradients and changed options there, new parameters back; or word that the step is skipped

An optimizer has one membership at a time; one that goes to another session gets another.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, final

import torch
from torch import Tensor

from farstep.errors import FarstepError, TensorMismatch
from farstep.link import Link, SessionSpec, Start
from farstep.optim.away import Away, shape_dtype
from farstep.optim.chosen import Chosen, chosen_of
from farstep.optim.gradient_dtypes import of_their_parameters
from farstep.optim.options import Options, changes, without
from farstep.optim.overlap import Overlap
from farstep.optim.remote_state import RemoteState
from farstep.optim.scaling import NOT_SCALED, Scaling
from farstep.optim.torch_form import check_state_dtype, to_session
from farstep.optim.writers import Claim, writing
from farstep.overlap import Overlapped
from farstep.protocol.fields import FieldKind, State
from farstep.protocol.messages import Evaluation
from farstep.protocol.receipt import StepReport
from farstep.settings import WorkerSettings

Parameters = Sequence[Tensor]
OpenLink = Callable[[SessionSpec, Sequence[Tensor], WorkerSettings, Start], Link]
InitialState = Callable[[Tensor, Mapping[str, FieldKind]], State | None]
"""Given a parameter and the state fields, returns the state it begins with, None where state begins with a step."""


@final
class Membership:
    """What an optimizer has in its session.

    Args:
        spec: what the session is.
        groups: the parameters of each of the optimizer's groups.
        chosen: which of them the session holds.
        settings: the worker's.
        opened_by: opens the link to it.
        initial_state: the state that a parameter begins with.
        param_groups: returns the optimizer's groups.
        state: torch's form of the state that a new session begins with, None for none.
        version: the version that a new session begins at.
        options: the groups' options as they are now, for pushes that begin before their step; None for no such pushes.

    Attributes:
        shown: the view whose values the parameters have at the moment; "" if they have their own.
        taken: the options that a session which was there already had in force, and that the groups have to take on;
            None where there is nothing to take.
        fits: whether the optimizer's parameters were those of the session when that was last looked at.
        scaler: who is told of steps that were skipped for Inf or NaN.

    Raises:
        FarstepError: the session cannot be had.
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
        self._chosen = chosen
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
        """Refuse to go on after `close`.

        Raises:
            FarstepError: the session was left.
        """
        _check_open(self.close, self.settings.session)

    def check_training(self, what: str) -> None:
        """Refuse what would take the values of a view for the parameters' own.

        Raises:
            FarstepError: they have them at the moment.
        """
        if self.shown:
            raise unusable(
                f"{what} inside swap_to({self.shown!r}): the parameters have the values of that view, not their own.",
                "Leave the `with` block first.",
            )

    def _remember(self, groups: Sequence[Parameters], chosen: Chosen, away: Away | None = None) -> None:
        """Remember what `holds` and `rebind` compare with: the parameters, and which of them the session has.

        Args:
            groups, chosen: as given to the constructor.
            away: those that are away, None for none.
        """
        self.fits = True
        self.state.hold_(self.parameters)
        self._chosen = chosen
        self._lengths = list(map(len, groups))
        self._every = list(chain.from_iterable(groups))
        self._forms = list(map(shape_dtype, self.parameters))
        self._away = Away(chosen.parameters, self._forms, {} if away is None else away.places)
        self._dtypes = [p.dtype for p in self.parameters]
        self._sizes = list(map(Tensor.numel, self.parameters))
        self._addresses = list(map(Tensor.data_ptr, self.parameters))

    def holds(self, groups: Sequence[Parameters]) -> bool:
        """Return whether these are the session's parameters, group by group, in the memory they had."""
        self.fits = (
            list(map(len, groups)) == self._lengths
            and all(map(is_, chain.from_iterable(groups), self._every))
            and list(map(Tensor.data_ptr, self.parameters)) == self._addresses
            and list(map(Tensor.numel, self.parameters)) == self._sizes
            and [p.dtype for p in self.parameters] == self._dtypes
            and (not self._chosen.left or self._chosen.leaves(self._every))
            and self._away.is_still_so
        )
        return self.fits

    def leave_out_away_(self, groups: Sequence[Parameters]) -> bool:
        """Go on without parameters that are away, if that is all that differs from what the session has.

        Return whether it is. See `farstep.optim.away`.
        """
        every = list(chain.from_iterable(groups))
        same = list(map(len, groups)) == self._lengths and all(map(is_, every, self._every))
        if not same or self._optimizer == "LBFGS" or not self._chosen.leaves(every):
            return False
        away = self._away.now(self.link.stand_in, lone=self.settings.private)
        if away is None or not self.link.rebind(away.parameters):
            return False
        self._away.settle_(away)
        self.parameters = away.parameters
        self._remember(groups, self._chosen, away)
        return True

    def unfit(self, why: str = "") -> TensorMismatch:
        """Return the error for parameters that have another shape or dtype than the session's, and state of before."""
        now = zip(self._chosen.described, self._away.own, self._forms, strict=True)
        changed = [(described.name, p) for described, p, form in now if shape_dtype(p) != form]
        name, p = changed[0] if changed else ("", None)
        which = f"Parameter {name!r} is {tuple(p.shape)} by now" if p is not None else "A parameter has changed"
        return TensorMismatch(
            f"{which}, and its state is of what it was before{f' ({why})' if why else ''}.",
            remedy="Give it its values back first. One that is away for a while must have no gradient: p.grad = None.",
            field=name or None,
            side="client",
        )

    @property
    def sends_nothing_early(self) -> bool:
        """Return whether there are gradients that a step would refuse, if they come."""
        return bool(self._chosen.ties)

    def fitting(self, groups: Sequence[Mapping[str, Any]]) -> Chosen | None:
        """Return which of the groups' parameters the session holds if they fit into it, one for one, else None.

        Args:
            groups: the optimizer's.
        """
        if [len(group["params"]) for group in groups] != self._lengths:
            return None
        try:
            chosen = chosen_of(groups, self._away.own)
        except TensorMismatch:
            return None
        if chosen.places != self._chosen.places:
            return None
        replaced = {p for p, then in zip(chosen.parameters, self._away.own, strict=True) if p is not then}
        if replaced & set(self._away.own):
            return None
        away = self._away_among(chosen, replaced)
        return None if away is None or (away.places and not replaced) else chosen

    def _away_among(self, chosen: Chosen, replaced: Collection[Tensor]) -> Away | None:
        """Return which of these parameters are away; None if one does not fit, such as a new one in another form."""
        old = {index: place for index, place in self._away.places.items() if chosen.parameters[index] not in replaced}
        known = Away(chosen.parameters, self._forms, old)
        away = [p for p, form in zip(chosen.parameters, self._forms, strict=True) if shape_dtype(p) != form]
        if not away:
            return Away(chosen.parameters, self._forms)
        if self._optimizer == "LBFGS" or any(p in replaced for p in away):
            return None
        return known.now(self.link.stand_in, lone=self.settings.private)

    def rebind(self, groups: Sequence[Mapping[str, Any]], chosen: Chosen) -> bool:
        """Take parameters that fit in the places of some; return whether the link can, else nothing changes.

        They bring their own values. State is that of the parameter: one that has an entry in `state` brings it, one
        that has none begins anew, and what belonged to the old ones stays under them.
        """
        replaced = {p for p, then in zip(chosen.parameters, self._away.own, strict=True) if p is not then}
        away = self._away_among(chosen, replaced)
        assert away is not None
        brought = self.state.brought(chosen.parameters)
        if not self.link.rebind(away.parameters):
            return False
        self._away.settle_(away)
        self.parameters = away.parameters
        self._write_state(brought)
        self.state.rebind_(chosen.parameters, brought)
        self._remember([group["params"] for group in groups], chosen, away)
        if self.overlap is not None:
            self.overlap.watch(chosen.parameters)
        return True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one to step on the parameters, of this process's threads and, with a server, of all processes.

        Raises:
            FarstepError: another one does; see `farstep.optim.writers`.
        """
        remote = self.settings.server is not None
        if self._writes_to[0] is not self._addresses:
            if remote:
                self._claim.take(self.parameters)
            self._writes_to = self._addresses, frozenset(filter(None, self._addresses))
        with writing(self._writes_to[1], waits=remote and self.link.consistency.waits_for_others):
            yield

    # -- steps ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Send edits of state and parameters; forget what was read of the state, which the next step makes old.

        `holds` has just said that the parameters are those of the session.

        Raises:
            TensorMismatch: there are gradients that a session cannot apply as torch would; nothing was sent.
        """
        self._chosen.check_step(self._every)
        self._send_state()
        self.link.settle_edits(self._addresses)

    def push(
        self, options: list[Options], scaling: Scaling = NOT_SCALED, evaluation: Evaluation | None = None
    ) -> StepReport:
        """Send the gradients, unless they overflowed, and the options that changed; bring the new parameters back."""
        changed = self._named(options)
        gradients = [p.grad for p in self.parameters]
        try:
            if scaling.overflowed:
                report = self.link.skip(changed)
            else:
                unscaled = scaling.unscaled(gradients)
                own = of_their_parameters(self._optimizer, self._chosen.described, self._dtypes, options, unscaled)
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
        """Return the options that go with a push: those that changed, or all where each push brings its own."""
        if self.settings.options == "push":
            return dict(enumerate(options))
        return changes(options, self._sent)

    def _in_force(self, named: Sequence[Options]) -> list[Options] | None:
        """Return what the session had in force when it was joined, of the options that are named here."""
        joined = self.link.joined_options
        if joined is None or self.settings.options == "push":
            return None
        return [{key: now.get(key, own[key]) for key in own} for now, own in zip(joined, named, strict=True)]

    def pull(self) -> int:
        """Send edits of the state, bring the parameters to the session's current version, and return it."""
        self._send_state()
        return self.link.pull()

    def append(self, options: Options, groups: Sequence[Parameters], chosen: Chosen) -> Options | None:
        """Add the last of these groups. If another worker has, parameters and state are the session's from now on.

        Return the options that the group has to take on then, None where there is nothing to take.
        """
        taken: Options | None = None
        count = len(self.parameters)
        described, parameters = chosen.described[count:], chosen.parameters[count:]
        if not self.link.append(options, described, parameters):
            self.state.forget_()
            if self.settings.options != "push":
                with suppress(FarstepError):  # the group is there; the next step sends what differs
                    now = self.link.options_in_force()[len(self._lengths)]
                    taken = options = {key: now.get(key, value) for key, value in options.items()}
        self.state.append_(parameters)
        self._sent = [*self._sent, options]
        self.parameters = [*self.parameters, *parameters]
        self._remember(groups, chosen, self._away)
        if self.overlap is not None:
            self.overlap.watch(chosen.parameters)
        return taken

    def rejoin(self, state: Mapping[Any, Any] | None, version: int) -> bool:
        """Join the session again; return whether it had to be created anew, from this state and at this version."""
        named = self._sent
        self._sent = [{} for _ in named]  # the session has the options of its creation, or of others
        created = self.link.rejoin(self._start(state, version))
        self.taken = self._in_force(named) if self.settings.options == "session" and not created else None
        self._sent = self.taken or self._sent
        return created

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
        """Send the state of some parameters; one whose state was taken away begins anew.

        Raises:
            TensorMismatch: it is of another dtype than the parameter that the session has; nothing was sent.
        """
        if changed:
            fields = self.link.fields
            for i, own in changed.items():
                check_state_dtype(self._chosen.described[i].name, self.parameters[i], own, fields)
            self.link.write(
                state={i: own or self._initial_state(self.parameters[i], fields) for i, own in changed.items()}
            )

    def _start(self, state: Mapping[Any, Any] | None, version: int) -> Start:
        """Return what a session begins with."""
        if state is None:
            return Start(None, version)

        def states(fields: Mapping[str, FieldKind]) -> list[State | None]:
            own = [to_session(p, state.get(p) or {}, fields) for p in self.parameters]
            for described, p, each in zip(self._chosen.described, self.parameters, own, strict=True):
                check_state_dtype(described.name, p, each, fields)
            return [each or self._initial_state(p, fields) for p, each in zip(self.parameters, own, strict=True)]

        return Start(states, version)


def _begin_push(
    member: weakref.ref[Membership], options: Callable[[], list[Options] | None], order: Sequence[int]
) -> Overlapped | None:
    """Begin a push with the options that its step would send now."""
    there, now = member(), options()
    if there is None or now is None or not there.close.alive or there.sends_nothing_early:
        return None
    return there.link.begin_push(order, there._named(now))


def _leave(link: Link, overlap: Overlap | None, claim: Claim) -> None:
    claim.release()
    if overlap is not None:
        overlap.close()
    link.close()


def unusable(what: str, remedy: str) -> FarstepError:
    """Return the error for what an optimizer cannot do."""
    return FarstepError(what, remedy=remedy, side="client")


def _check_open(closing: weakref.finalize[..., Any], session: str) -> None:
    if not closing.alive:
        raise unusable(
            f"This optimizer was closed; it has left session {session!r}.",
            "Close it after its last use, or make a new one.",
        )
