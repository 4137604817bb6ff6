"""An optimizer in a session: what every worker can do there beside `torch.optim.Optimizer`'s own.

Join and leave, know the version held, update the parameters, and rejoin after the session was lost. A session lives on
a server, or in this process: that host is another package, found by the entry point `farstep.hosts`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from farstep.errors import FarstepError, StateRolledBack
from farstep.heartbeat import Heartbeat, beating
from farstep.http_link import HttpLink
from farstep.link import Link, SessionSpec, Start
from farstep.optim.chosen import chosen_of
from farstep.optim.membership import Membership, OpenLink, unusable
from farstep.optim.namesakes import explaining_namesake, note_latest_
from farstep.optim.options import option_kinds, plain_options, take_
from farstep.optim.torch_form import initial_state, torch_initial_states
from farstep.protocol.consistency import Consistency, checked
from farstep.protocol.plain import pythons_own
from farstep.protocol.receipt import StepReport
from farstep.settings import WorkerSettings, in_fresh_session


def open_link(
    spec: SessionSpec, parameters: Sequence[Tensor], settings: WorkerSettings, start: Start | None = None
) -> Link:
    """Open the link that the settings ask for: to a server, or embedded in this process.

    Raises:
        FarstepError: the session exists with other options, or the server does not answer in time.
    """
    if settings.server is not None:
        return HttpLink(spec, parameters, settings, start)
    for entry in entry_points(group="farstep.hosts", name="embedded"):
        return cast(Link, entry.load()(spec, parameters, settings, start))
    raise FarstepError(
        "No server is named and the embedded host is not installed.",
        remedy="Give server=..., set FARSTEP_SERVER, or install farstep completely.",
        side="client",
    )


class InSession(torch.optim.Optimizer):
    """Base of `RemoteOptimizer`.

    Attributes:
        last_step: the report of the last `step()`, None before the first one.
    """

    torch_class: ClassVar[type[torch.optim.Optimizer]]
    """torch's class of the same name."""
    of_constructor: ClassVar[frozenset[str]] = frozenset()
    """Options whose value in the constructor counts, whatever a group says."""
    counts_in: ClassVar[frozenset[torch.dtype] | None] = None
    """The default dtypes with which torch's class computes the numbers in its state as a session does; None for all."""
    same_in_autocast: ClassVar[frozenset[torch.dtype] | None] = None
    """The dtypes of `torch.autocast` in which torch's step computes as outside of it; None for all."""
    if_missing: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Values that torch's step takes for options missing from a group; it refuses a group without any other option."""
    opened_by: OpenLink = staticmethod(open_link)
    """Opens the link to a session; classes of tests and benchmarks may have another."""

    last_step: StepReport | None

    @property
    def version(self) -> int:
        """The version of the session's parameters that this worker holds: its count of committed steps."""
        return self._membership.link.version

    @property
    def session(self) -> str:
        """The session's name."""
        return self._membership.settings.session

    @property
    def worker(self) -> str:
        """This worker's name."""
        return self._membership.settings.worker

    @property
    def consistency(self) -> Consistency:
        """The session's consistency mode, as this worker learned it with its last step."""
        return self._membership.link.consistency

    @property
    def durability(self) -> str:
        """What the session's server keeps on its disk, as text: `none`, `journal:os`, `snapshot:every_s=60`..."""
        return self._membership.link.durability

    def set_consistency(self, mode: Consistency) -> None:
        """Switch the session to another consistency mode, for all its workers.

        Waiting pushes are offered to it in the order of the workers' names. Other workers learn the mode with their
        next step; a worker that joins or rejoins before that has to name the new mode.

        Raises:
            InvalidOption: `mode` is not a mode.
            SessionFull: more workers are live than the mode has places for.
            FarstepError: the session refused it for another reason, or `Unavailable`.
        """
        self._joined().link.set_consistency(checked(mode))

    def options_in_force(self) -> list[dict[str, Any]]:
        """Return the options of each param group that are in force in the session, no matter which worker set them.

        With `options="push"` this worker's pushes have the options of its own groups, whatever is in force.

        Raises:
            SessionLost: the session is gone.
            Unavailable: no answer came within `timeout_s`.
        """
        return [dict(group) for group in self._joined().link.options_in_force()]

    def heartbeat(self) -> Heartbeat:
        """Renew this worker's lease and return the session's answer. Pushes and pulls renew it, too.

        One small request without tensors, for a worker that evaluates, saves or loads for longer than a lease. Others
            wait for live workers: send no heartbeat where they should continue without this one.

        Raises:
            Fenced: another process has this worker's name, or another worker took its place; `rejoin()` comes back.
            SessionLost: the session is gone.
            StateRolledBack: the session went back to an older version, and `on_rollback` is "raise".
            Unavailable: no answer came within `timeout_s`.
        """
        member = self._joined()
        try:
            return member.link.heartbeat()
        except StateRolledBack as exc:
            self.last_step = self._accepted(member, exc)
            return member.link.heartbeat()

    @contextmanager
    def keep_alive(self) -> Iterator[None]:
        """Renew this worker's lease from a thread during work that cannot be interrupted: `torch.save`, an evaluation.

        A refusal by the session is not raised here, but by the next step or `heartbeat()`.
        """
        with beating(partial(self._joined().link.heartbeat, once=True)):
            yield

    def pull(self) -> int:
        """Update the parameters to the session's current version, without a step, and return the version."""
        member = self._member()
        member.check_training("pull()")
        with member.writing(), explaining_namesake(member.settings, member):
            try:
                self._settle(member)
                return member.pull()
            except StateRolledBack as exc:
                self.last_step = self._accepted(member, exc)
                return self.version

    def rejoin(self, state_dict: dict[str, Any] | None = None, *, version: int | None = None) -> bool:
        """Join the session again after `SessionLost`, `StateRolledBack` or `Fenced`; return whether it was created.

        An existing session is joined, and its parameters replace this worker's. A lost one is created from this
        worker's parameters, with the optimizer state of `state_dict` and at `version` (default: the version held).
        """
        member = self._member()
        member.check_training("rejoin()")
        before = {"state": self.state, "param_groups": self.param_groups}
        if state_dict is not None:
            super().load_state_dict(state_dict)
        try:
            state = None if state_dict is None else self.state
            created = member.rejoin(state, self.version if version is None else pythons_own(version))
        except BaseException:
            vars(self).update(before)
            raise
        note_latest_(member, member.settings)
        self._take_in_force()
        member.state.replace_({} if self.state is member.state else self.state)
        self.state = member.state
        if created and state_dict is None and member.link.fields and self.version:
            warnings.warn(
                f"Session {self.session!r} was created anew from the parameters here, without optimizer state. "
                "rejoin(state_dict) goes on with that of a checkpoint; an exported session has to be imported first.",
                UserWarning,
                stacklevel=2,
            )
        return created

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Send nothing during the backward passes inside, which accumulate gradients; the next one sends them.

        With `overlap=True` a loop that accumulates equally often in each step does not need it; another loop only loses
        time without it. Without the option this does nothing.
        """
        overlap = self._joined().overlap
        with nullcontext() if overlap is None else overlap.held():
            yield

    def inform(self, scaler: torch.amp.GradScaler) -> None:
        """Inform a scaler, from now on, of each step that is skipped for Inf or NaN, no matter which worker found it.

        Its next `update()` then lowers the scale, as it does for an overflow of its own. Where every worker informs
        its scaler, all of them keep the same scale.
        """
        self._joined().scaler = scaler

    def close(self) -> None:
        """Leave the session; a private one is removed from the server. A second call does nothing."""
        self._membership.close()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Have GradScaler always call `step()` where other workers wait for it; see `farstep.optim.scaling`."""
        return self._asked_for_scaling or self.consistency.waits_for_others

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, asked: bool) -> None:
        self._asked_for_scaling = asked

    # -- inside -----------------------------------------------------------------------------------------------------

    def _open(self, settings: WorkerSettings, state: Mapping[Any, Any] | None = None, version: int = 0) -> None:
        """Open the session at a version, with torch's form of its initial state."""
        chosen = chosen_of(self.param_groups)
        spec = SessionSpec(
            name=settings.session,
            # A subclass, the user's or Lightning's, counts as the class that it derives from.
            optimizer=next(each for each in type(self).__mro__ if "torch_class" in vars(each)).__name__,
            groups=tuple(self._options()),
            parameters=tuple(chosen.described),
            consistency=settings.consistency,
            nonfinite=settings.nonfinite,
            kernel=settings.kernel,
            policies=settings.policies,
            durability=settings.durability,
        )
        with explaining_namesake(settings):
            self._membership = Membership(
                spec,
                [group["params"] for group in self.param_groups],
                chosen,
                settings,
                opened_by=self.opened_by,
                initial_state=partial(initial_state, self.torch_class, self.defaults),
                param_groups=partial(_groups_of, weakref.ref(self)),
                state=state,
                version=version,
                options=partial(_options_of, weakref.ref(self)) if self._overlaps(settings) else None,
            )
        note_latest_(self._membership, settings)
        self._take_in_force()
        own = self.state if state is None else state
        if state is None and self._membership.link.has_initial_state and chosen.left:
            own = {**own, **torch_initial_states(self.torch_class, self.defaults, chosen.left_out)}
        self._membership.state.replace_(own)
        self.state = self._membership.state
        self.last_step = None
        self._asked_for_scaling = False

    def _overlaps(self, settings: WorkerSettings) -> bool:
        """Return whether gradients are sent while others are still being computed."""
        return settings.overlap and settings.server is not None

    def _take_in_force(self) -> None:
        """Put the options in force in a joined session into the groups."""
        if taken := self._membership.taken:
            for group, named, now in zip(self.param_groups, self._options(), taken, strict=True):
                take_(group, named, now)

    def _options(self) -> list[dict[str, Any]]:
        """Return each group's options as plain values that travel."""
        kinds, fixed = option_kinds(self.torch_class), {key: self.defaults[key] for key in self.of_constructor}
        missing = self.if_missing
        groups = [{**missing, **group, **fixed} if fixed or missing else group for group in self.param_groups]
        return [plain_options(group, kinds) for group in groups]

    def _member(self) -> Membership:
        """Return the membership, updated to the parameters that the groups have now.

        Raises:
            FarstepError: after `close`, in a copy, or with parameters that a named session cannot take.
        """
        member = self._looked_at()
        if not member.fits and not member.leave_out_away_([group["params"] for group in self.param_groups]):
            self._move(member)
        return self._membership

    def _looked_at(self) -> Membership:
        """Return the membership for reading; parameters that do not fit into the session leave it as it is.

        Raises:
            FarstepError: after `close`, or in a copy.
        """
        member = self._joined()
        if not member.holds([group["params"] for group in self.param_groups]):
            chosen = member.held.fitting(self.param_groups)
            if chosen is not None:
                self._settle(member)
                member.rebind(self.param_groups, chosen)
        return member

    def _joined(self) -> Membership:
        """Return the membership.

        Raises:
            FarstepError: after `close`, or in a copy.
        """
        member: Membership | None = getattr(self, "_membership", None)
        if member is None:
            raise unusable("This optimizer is in no session.", "Make a new one and load a state_dict.")
        member.check()
        return member

    def _move(self, member: Membership) -> None:
        """Move to a new private session of the groups as they are now, with the same version and state."""
        if not member.settings.private:
            raise unusable(
                f"Session {self.session!r}, which other workers may share, keeps the parameters it began with; in "
                "the groups some were added, removed, reordered, or have another shape or dtype now.",
                "Restore the parameters, or make a new optimizer for the present ones.",
            )
        before = dict(vars(self))
        try:
            self._open(in_fresh_session(member.settings), self.state.copy(), self.version)
        except BaseException as exc:
            vars(self).update(before)
            if isinstance(exc, ValueError) and not isinstance(exc, FarstepError):
                raise member.held.unfit(str(exc)) from exc
            raise
        self.last_step = before["last_step"]
        self._membership.scaler = member.scaler
        member.close()

    def _accepted(self, member: Membership, error: StateRolledBack) -> StepReport:
        """Join a session again that went back, take its parameters, and return the report of what was dropped.

        Raises:
            StateRolledBack: `on_rollback` is "raise", or the parameters have the values of a view at the moment.
        """
        if member.settings.on_rollback != "accept" or member.shown:
            raise error
        self.rejoin()
        return StepReport(
            version=self.version,
            applied=False,
            reason="rolled_back",
            detail=error.detail,
            durability=self.durability,
        )

    def _settle(self, member: Membership) -> None:
        """Send what differs in a mapping that replaced the state."""
        member.settle(self.state)
        self.state = member.state


def _groups_of(optimizer: weakref.ref[InSession]) -> Sequence[Mapping[str, Any]]:
    there = optimizer()
    return () if there is None else there.param_groups


def _options_of(optimizer: weakref.ref[InSession]) -> list[dict[str, Any]] | None:
    there = optimizer()
    with suppress(KeyError):  # its step says what is missing
        return None if there is None else there._options()
    return None
