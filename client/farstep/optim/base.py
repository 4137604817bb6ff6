"""The client object: a `torch.optim.Optimizer` whose update happens in a session.

It derives from `torch.optim.Optimizer` itself, so hooks fire once, schedulers and scalers accept it, and `state_dict`
has torch's form. torch's own class of the same name checks the options, so errors and defaults are torch's. What is
different:

- `step()` sends the gradients and brings the new parameters back, in place;
- the state lives in the session; `state_dict()` fetches it, `load_state_dict()` sends it;
- group options are compared with those last sent, and changes travel with the next step;
- parameters edited by the caller between steps are noticed by their version counter and sent before the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.errors import FarstepError, InvalidOption
from farstep.link import SessionSpec, State, StepReport, open_link
from farstep.optim.options import changes, check_group, plain_options, without
from farstep.optim.torch_form import as_torch, describe, to_session
from farstep.settings import Place, RemoteOptions, resolve


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

    def __init__(self, params: ParamsT, options: dict[str, Any], remote: RemoteOptions) -> None:
        if options.get("differentiable"):
            raise InvalidOption(
                "differentiable=True cannot be remote: autograd would have to run through the step on another machine.",
                remedy=f"Use torch.optim.{type(self).__name__} for a step inside the graph.",
                field="differentiable",
                side="client",
            )
        place = resolve(remote)
        defaults = self.twin([torch.zeros(1)], **options).defaults
        super().__init__(params, defaults)
        for group in self.param_groups:
            own = {key: value for key, value in group.items() if key in self.defaults}
            if own != self.defaults:
                check_group(self.twin, own)
        self._open(place)

    # -- the session ------------------------------------------------------------------------------------------------

    def _open(self, place: Place) -> None:
        self._place = place
        self.last_step = None
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
        self._link = open_link(spec, self._parameters, place)
        self._closing = weakref.finalize(self, self._link.close)
        self._have_seen()

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
                "This optimizer is a copy, and only the original is in a session.",
                "Make a new one and load the original's state_dict.",
            )
        if not closing.alive:
            raise _refused(
                f"This optimizer was closed; it has left session {self.session!r}.",
                "Close it after its last use, or make a new one.",
            )
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
        version = self._link.pull()
        self._have_seen()
        return version

    def rejoin(self, state_dict: dict[str, Any] | None = None, *, version: int | None = None) -> bool:
        """Join the session again after `SessionLost` or `Fenced`; return whether it had to be created anew.

        A session that is there is joined, and its parameters replace this worker's. One that is gone is created from
        this worker's parameters, with the optimizer state of `state_dict` and at `version` (default: the version held).
        """
        self._check_session()
        self._sent = [{} for _ in self.param_groups]  # the session has the options of its creation, or of others
        with self._loaded(state_dict) as state:
            created = self._link.rejoin(state, version)
        self._forget_state()
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
        self._forget_state()
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
        """Add a group, as the constructor does; a session that is open keeps the groups it has.

        Raises:
            FarstepError: the session is open.
        """
        if getattr(self, "_link", None) is not None:
            raise _refused(
                "The groups of a session are those of the constructor.", "Give all parameters to the constructor."
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's form of the state, fetched from the session; `torch.optim` loads it."""
        self._check_session()
        for p, values in zip(self._parameters, self._link.read_state(), strict=True):
            if values is not None:
                self.state[p] = {**self.state[p], **as_torch(p, values)}
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's class of the same name, and send it to the session.

        Raises:
            ValueError: torch's own, when the groups or parameters do not match, or the state is another optimizer's.
                Nothing has changed then.
            FarstepError: what the session refused, or `Unavailable`. Here nothing has changed then; load it again.
        """
        self._check_session()
        with self._loaded(state_dict) as state:
            self._link.write(state=state)

    @contextmanager
    def _loaded(self, state_dict: dict[str, Any] | None) -> Iterator[list[State | None] | None]:
        """Load a state_dict as torch does and yield its state for the session; undo it if that raises."""
        if state_dict is None:
            yield None
            return
        before = {"state": self.state, "param_groups": self.param_groups}
        super().load_state_dict(state_dict)
        try:
            yield [to_session(self.state.get(p) or {}, self._link.fields) for p in self._parameters]
        except BaseException:
            vars(self).update(before)
            raise
        self._forget_state()

    def _forget_state(self) -> None:
        """Drop fetched state, which the next step makes old. A state_dict given out keeps what it has."""
        for p in self._parameters if self.state else ():
            if p in self.state:
                own = cast("dict[str, Any]", self.state.pop(p))
                if kept := {key: value for key, value in own.items() if key not in self._link.fields}:
                    self.state[p] = kept


def _refused(what: str, remedy: str) -> FarstepError:
    return FarstepError(what, remedy=remedy, side="client")
