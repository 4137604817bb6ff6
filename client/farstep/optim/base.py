"""The client object: a `torch.optim.Optimizer` whose update happens in a session.

It derives from `torch.optim.Optimizer` itself, so hooks fire once, schedulers and scalers accept it, and `state_dict`
has torch's form. torch's own class of the same name checks the options, so errors and defaults are torch's. What is
different:

- `step()` sends the gradients and brings the new parameters back, in place;
- the state lives in the session; `state` and `state_dict()` fetch what is read, and what is written into `state` or
  loaded is sent (`farstep.optim.state`);
- a copy, by deepcopy or pickle, is in a private session of its own with the same state;
- group options are compared with those last sent, and changes travel with the next step;
- parameters edited by the caller between steps are noticed by their version counter and sent before the step.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.errors import FarstepError, InvalidOption
from farstep.fields import FieldKind
from farstep.link import SessionSpec, Start, State, StepReport, open_link
from farstep.optim.options import arguments, changes, check_group, plain_options, without
from farstep.optim.state import RemoteState
from farstep.optim.torch_form import completed, describe, to_session
from farstep.settings import Place, RemoteOptions, carried, elsewhere, of_copy, resolve


class RemoteOptimizer(torch.optim.Optimizer):
    """Base of every farstep optimizer; not used by itself.

    Attributes:
        last_step: what the last `step()` did, None before the first one.
    """

    twin: ClassVar[type[torch.optim.Optimizer]]
    """torch's class of the same name."""
    of_constructor: ClassVar[frozenset[str]] = frozenset()
    """Options whose value in the constructor counts, whatever a group says."""

    last_step: StepReport | None

    def __init__(
        self,
        params: ParamsT,
        options: dict[str, Any],
        remote: RemoteOptions,
        state: Mapping[Any, Any] | None = None,
    ) -> None:
        if options.get("differentiable"):
            raise InvalidOption(
                "differentiable=True cannot be remote: autograd would have to run through the step on another machine.",
                remedy=f"Use torch.optim.{type(self).__name__} for a step inside the graph.",
                field="differentiable",
                side="client",
            )
        place = resolve(remote)
        defaults = self.twin([torch.zeros(1, 1)], **options).defaults
        super().__init__(params, defaults)
        self._check_groups()
        self._open(place, state)

    # -- the session ------------------------------------------------------------------------------------------------

    def _open(self, place: Place, state: Mapping[Any, Any] | None = None, version: int = 0) -> None:
        """Open the session at a version, with torch's form of a state that it begins with."""
        self._place = place
        self.last_step: StepReport | None = None
        self._parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._sent = self._options()
        spec = SessionSpec(
            name=place.session,
            # A subclass, the user's or Lightning's, is what it derives from.
            optimizer=next(each for each in type(self).__mro__ if "twin" in vars(each)).__name__,
            groups=tuple(self._sent),
            parameters=tuple(describe(self.param_groups)),
            consistency=place.consistency,
            nonfinite=place.nonfinite,
            kernel=place.kernel,
        )
        self._link = open_link(spec, self._parameters, place, self._start(state, version))
        self._closing = weakref.finalize(self, self._link.close)
        self._state = RemoteState(self._link, self._parameters, partial(_check_open, self._closing, place.session))
        self._state.replace_(self.state if state is None else state)
        self.state = self._state
        self._have_seen()

    def _check_groups(self) -> None:
        """Let torch's class check the options of groups that have their own."""
        for group in self.param_groups:
            own = {key: value for key, value in group.items() if key in self.defaults}
            if own != self.defaults:
                check_group(self.twin, own)

    def _options(self) -> list[dict[str, Any]]:
        """Return each group's options as plain values that travel."""
        fixed = {key: self.defaults[key] for key in self.of_constructor}
        return [plain_options({**group, **fixed}, self.defaults) for group in self.param_groups]

    def _have_seen(self) -> None:
        """Remember that the session has the parameters as they are now."""
        if not self._link.sees_edits:
            self._seen = [(p._version, p.data_ptr()) for p in self._parameters]

    def _check_session(self) -> None:
        """Refuse what this optimizer cannot do: go on after `close`, in a copy, or with other parameters."""
        if (closing := getattr(self, "_closing", None)) is None:
            raise _refused(
                "This optimizer is in no session.",
                "Make a new one and load a state_dict.",
            )
        _check_open(closing, self.session)
        if [id(p) for group in self.param_groups for p in group["params"]] != list(map(id, self._parameters)):
            raise _refused(
                "A parameter in a group was replaced, added or removed; the session has those of the constructor.",
                "Make a new optimizer for the new parameters.",
            )

    @property
    def version(self) -> int:
        """The version of the session's parameters that this worker holds: its count of committed steps."""
        return self._link.version

    @property
    def session(self) -> str:
        """The session's name."""
        return self._place.session

    @property
    def worker(self) -> str:
        """This worker's name."""
        return self._place.worker

    def pull(self) -> int:
        """Bring the parameters to the session's current version, without a step, and return the version."""
        self._check_session()
        self._send_state()
        version = self._link.pull()
        self._have_seen()
        return version

    def rejoin(self, state_dict: dict[str, Any] | None = None, *, version: int | None = None) -> bool:
        """Join the session again after `SessionLost` or `Fenced`; return whether it had to be created anew.

        A session that is there is joined, and its parameters replace this worker's. One that is gone is created from
        this worker's parameters, with the optimizer state of `state_dict` and at `version` (default: the version held).
        """
        self._check_session()
        before = {"state": self.state, "param_groups": self.param_groups}
        if state_dict is not None:
            super().load_state_dict(state_dict)
        self._sent = [{} for _ in self.param_groups]  # the session has the options of its creation, or of others
        try:
            state = None if state_dict is None else self.state
            created = self._link.rejoin(self._start(state, self.version if version is None else version))
        except BaseException:
            vars(self).update(before)
            raise
        self._state.replace_({} if self.state is self._state else self.state)
        self.state = self._state
        self._have_seen()
        return created

    def close(self) -> None:
        """Leave the session; a private one is removed from the server. Safe to call twice."""
        self._closing()

    # -- torch.optim.Optimizer --------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step in the session and update the parameters in place.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            FarstepError: what the session refused, or `Unavailable` when no answer came within `timeout_s`. The
                parameters are then as they were, and the step may be tried again.
        """
        self._check_session()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._send_state()
        if not self._link.sees_edits:
            edited = [i for i, p in enumerate(self._parameters) if (p._version, p.data_ptr()) != self._seen[i]]
            if edited:
                self._link.write(edited)
                self._have_seen()
        options = self._options()
        changed = changes(options, self._sent)
        try:
            self.last_step = self._link.push([p.grad for p in self._parameters], changed)
        except BaseException:
            self._sent = without(self._sent, changed)
            raise
        self._sent = options
        self._have_seen()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the constructor does; a private session is replaced by one that has it, at the same version.

        Raises:
            ValueError, TypeError: torch's own, when the group's parameters or options are not acceptable.
            FarstepError: other workers may be in the session, whose groups therefore stay; or the new session cannot
                be had. Nothing has changed then.
        """
        if getattr(self, "_link", None) is None:
            super().add_param_group(param_group)
            return
        self._check_session()
        if not self._place.private:
            raise _refused(
                f"The groups of session {self.session!r}, which other workers may share, are those it began with.",
                "Give all parameters to the constructor.",
            )
        before = dict(vars(self))
        state = self.state.copy()
        super().add_param_group(param_group)
        try:
            self._check_groups()
            self._open(elsewhere(self._place), state, self.version)
        except BaseException:
            vars(self).update(before)
            self.param_groups.pop()
            raise
        self.last_step = before["last_step"]
        before["_closing"]()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's form of the state, fetched from the session as far as it is not here; `torch.optim` loads it.

        What was read since the last step is not fetched again, unless others have taken the session on.
        """
        self._check_session()
        if not self._place.private:
            self._refresh_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's class of the same name; send the session what it has not.

        Raises:
            ValueError: torch's own, when the groups or parameters do not match, or the state is another optimizer's.
                Nothing has changed then.
            FarstepError: what the session refused, or `Unavailable`. Here nothing has changed then; load it again.
        """
        self._check_session()
        before = {"state": self.state, "param_groups": self.param_groups}
        super().load_state_dict(state_dict)
        try:
            self._settle_state()
        except BaseException:
            vars(self).update(before)
            raise

    # -- the state --------------------------------------------------------------------------------------------------

    def _start(self, state: Mapping[Any, Any] | None, version: int) -> Start:
        """Return what a session begins with."""
        if state is None:
            return Start(None, version)

        def states(fields: Mapping[str, FieldKind]) -> list[State | None]:
            return [to_session(p, state.get(p) or {}, fields) or self._newborn(p, fields) for p in self._parameters]

        return Start(states, version)

    def _newborn(self, p: Tensor, fields: Mapping[str, FieldKind]) -> State | None:
        """Return what torch's class gives a parameter at its construction, None where state begins with a step."""
        fresh = self.twin([torch.empty_like(p)], **arguments(self.twin, self.defaults))
        return next((to_session(p, own, fields) for own in fresh.state.values()), None)

    def _write_state(self, changed: Mapping[int, State | None]) -> None:
        """Send the state of some parameters; one whose state was taken away begins anew."""
        if changed:
            fields = self._link.fields
            self._link.write(state={i: own or self._newborn(self._parameters[i], fields) for i, own in changed.items()})

    def _settle_state(self) -> None:
        """Bring a mapping that stands in the place of the state to the session."""
        if self.state is not self._state:
            changed = self._state.differences(self.state)
            self._write_state(changed)
            self._state.settle_(self.state, changed)
            self.state = self._state

    def _send_state(self) -> None:
        """Send edits of the state and forget what was read, which the next step makes old."""
        self._settle_state()
        self._write_state(self._state.edits())
        self._state.forget_()

    def _refresh_state(self) -> None:
        """Send edits of the state and forget what was read if others have taken the session on."""
        self._settle_state()
        if edits := self._state.edits():
            self._write_state(edits)
            self._state.forget_()
        self._state.refresh_()

    # -- copies -----------------------------------------------------------------------------------------------------

    def to_local(self) -> torch.optim.Optimizer:
        """Return torch's optimizer of the same name over the same parameters, with options and a copy of the state.

        It continues as the session would. This optimizer stays open: close it if that was its last use.
        """
        self._check_session()
        groups = [dict(group) for group in self.param_groups]
        local = self.twin(groups, **arguments(self.twin, self.defaults))
        local.state.clear()
        for key, own in self.state.items():
            local.state[key] = {name: v.clone() if isinstance(v, Tensor) else v for name, v in own.items()}
        for group in groups:
            for p in group["params"] if group.get("capturable") or group.get("fused") else ():
                own = local.state.get(p, {})
                own.update(
                    {key: own[key].to(p.device) for key in ("step", "mu_product") if isinstance(own.get(key), Tensor)}
                )
        return local

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: torch's part, and where its session shall be. The token stays here."""
        self._check_session()
        return {
            "defaults": self.defaults,
            "state": defaultdict(dict, {key: dict(own) for key, own in self.state.items()}),
            "param_groups": self.param_groups,
            "last_step": self.last_step,
            "_moved": (carried(self._place), self.version),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take torch's part of a state; the state of a copy opens a session for it.

        Raises:
            FarstepError: the session of the copy cannot be had.
        """
        state = completed(self.twin, state)
        moved = state.pop("_moved", None)
        super().__setstate__(state)
        if moved is not None:
            options, version = moved
            self._open(of_copy(options), self.state, version)
            self.last_step = state["last_step"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = deepcopy(self.__getstate__(), memo)
        options, version = state.pop("_moved")
        here: RemoteOptions = {"token": self._place.token, "transport": self._place.transport}
        state["_moved"] = ({**options, **here}, version)
        copied.__setstate__(state)
        return copied


def _check_open(closing: weakref.finalize[..., Any], session: str) -> None:
    if not closing.alive:
        raise _refused(
            f"This optimizer was closed; it has left session {session!r}.",
            "Close it after its last use, or make a new one.",
        )


def _refused(what: str, remedy: str) -> FarstepError:
    return FarstepError(what, remedy=remedy, side="client")
