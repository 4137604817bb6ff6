"""The client object: a `torch.optim.Optimizer` whose update happens in a session.

It derives from `torch.optim.Optimizer`, so hooks fire once, schedulers and scalers accept it, and `state_dict` has
torch's form. torch's class of the same name checks the options, so errors and defaults are torch's. The differences:

- `step()` sends the gradients and updates the parameters in place from the answer;
- the state lives in the session; `state` and `state_dict()` fetch what is read, and what is written or loaded is sent
  (`farstep.optim.remote_state`);
- a copy, by deepcopy or pickle, has a private session of its own with the same state;
- group options are compared with those last sent, and changes travel with the next step;
- edits of parameters between steps are found by comparing bytes, and sent before the step (`farstep.tensors.edits`);
- parameters replaced inside a group are followed, with the state that was moved to them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self, overload

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from farstep.errors import FarstepError, InvalidOption, StateRolledBack, TensorMismatch, invalid_option
from farstep.optim.chosen import chosen_of
from farstep.optim.membership import Membership
from farstep.optim.namesakes import explaining_namesake, numbered_session
from farstep.optim.options import check_group, check_types, refusal, take_
from farstep.optim.scaling import scaling_of, tell_
from farstep.optim.torch_form import completed, local
from farstep.optim.views import WithViews
from farstep.settings import RemoteOptions, options_of_copy, resolve, settings_of_copy


class RemoteOptimizer(WithViews):
    """Base class of every farstep optimizer."""

    def __init__(
        self,
        params: ParamsT,
        options: dict[str, Any],
        remote: RemoteOptions,
        state: Mapping[Any, Any] | None = None,
    ) -> None:
        if options.get("differentiable"):
            raise invalid_option(
                "differentiable=True cannot be remote: autograd would have to run through the step on another machine.",
                remedy=f"Use torch.optim.{type(self).__name__} for a step inside the graph.",
                field="differentiable",
            )
        try:
            settings = resolve(remote)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__() got an {error}") from None
        defaults = self.torch_class([torch.zeros(1, 1, device="cpu")], **options).defaults
        super().__init__(params, defaults)
        self._check_groups(self.param_groups)
        with numbered_session(settings) as own:
            self._open(own, state)

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Let torch's class check the options of new groups that have their own."""
        for group in groups:
            own = {key: value for key, value in group.items() if key in self.defaults}
            if any(value is not self.defaults[key] for key, value in own.items()):  # arrays have no truth of ==
                check_group(self.torch_class, own)

    def _check_surroundings(self, member: Membership) -> None:
        """Refuse a default dtype, or autocast, with which torch's class would round differently than the session.

        Raises:
            InvalidOption: naming it.
        """
        if self.counts_in is not None and (dtype := torch.get_default_dtype()) not in self.counts_in:
            raise invalid_option(
                f"With {dtype} as torch's default dtype, {self.torch_class.__name__} keeps its numbers in another "
                "precision than a session, which has them in float32.",
                remedy="Step with torch.set_default_dtype(torch.float32); the parameters may be of any dtype.",
                field="dtype",
            )
        if self.same_in_autocast is None or member.settings.server is None:
            return
        for device in {p.device.type for p in member.parameters}:
            dtype = torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device) and dtype not in self.same_in_autocast:
                raise invalid_option(
                    f"Inside torch.autocast({device!r}, dtype={dtype}) torch's {self.torch_class.__name__} multiplies "
                    "matrices in that dtype; the server's does not.",
                    remedy="Call step() after the `with torch.autocast` block, which is for the forward pass.",
                    field="autocast",
                )

    # -- torch.optim.Optimizer --------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # which, unlike torch.compiler.disable, does not import the compiler with us
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step in the session and update the parameters in place.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: torch's own, for gradients that torch's class of the same name does not take.
            FarstepError: the session refused the step, or `Unavailable`: no answer came within `timeout_s`. The
                parameters are unchanged, and the step may be tried again.
            StateRolledBack: the session went back to an older version, and `on_rollback` is "raise".
        """
        member = self._member()
        member.check_training("step()")
        self._check_surroundings(member)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            member = self._member()
        with member.writing(), scaling_of(vars(self)) as scaling:
            try:
                self._settle(member)
                check_types(self.torch_class, self.param_groups)
                with explaining_namesake(member.settings, member):
                    member.prepare()
                    self.last_step = member.push(self._options(), scaling)
            except StateRolledBack as back:
                self.last_step = self._accepted(member, back)
            except (InvalidOption, TensorMismatch) as refused_there:
                if (error := refusal(self.torch_class, self.defaults, self.param_groups)) is not None:
                    raise error from refused_there
                raise
            if member.scaler is not None:
                tell_(member.scaler, self, self.last_step)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the constructor does; the session grows by it, as one new version.

        Every other worker of the session has to add the same group, and gets an error until it does. The second worker
        to add it takes the session's parameters, of this group and of the others.

        Raises:
            ValueError, TypeError: torch's own, when the group's parameters or options are not acceptable.
            FarstepError: the session refused the group, for example because it has another one in this place; or
                `Unavailable`. Nothing has changed here; add the group again.
        """
        if getattr(self, "_membership", None) is None:
            super().add_param_group(param_group)
            return
        member = self._member()
        member.check_training("add_param_group()")
        super().add_param_group(param_group)
        try:
            self._check_groups(self.param_groups[-1:])
            chosen = chosen_of(self.param_groups, member.parameters)
            named = self._options()[-1]
            taken = member.append(named, [group["params"] for group in self.param_groups], chosen)
            if taken is not None:
                take_(self.param_groups[-1], named, taken)
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form, which `torch.optim` loads; fetch what is not here from the session.

        What was read since the last step is not fetched again, unless other workers have stepped.
        """
        member = self._looked_at()
        if member.fits and not member.settings.private:
            self._settle(member)
            member.refresh()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's class of the same name, and send what the session lacks.

        Raises:
            ValueError: torch's own, when the groups or parameters do not match, or the state is another optimizer's.
                Nothing has changed then.
            FarstepError: the session refused it, or `Unavailable`. Nothing has changed here; load it again.
        """
        member = self._looked_at()
        before = {"state": self.state, "param_groups": self.param_groups}
        super().load_state_dict(state_dict)
        try:
            if member.fits:  # else the state stays here until a step takes it to a session that fits
                self._settle(member)
        except BaseException:
            vars(self).update(before)
            raise

    # -- copies -----------------------------------------------------------------------------------------------------

    def to_local(self) -> torch.optim.Optimizer:
        """Return torch's optimizer of the same name over the same parameters, with the options and a copy of the state.

        It continues as the session would. This optimizer stays open; close it after its last use.
        """
        self._looked_at()
        return local(self.torch_class, self.param_groups, self.defaults, self.state)

    def __getstate__(self) -> dict[str, Any]:
        """Return the contents of a copy: torch's part, and the options of its session. The token is not copied."""
        member = self._looked_at()
        return {
            "defaults": self.defaults,
            "state": defaultdict(dict, {key: dict(own) for key, own in self.state.items()}),
            "param_groups": self.param_groups,
            "last_step": self.last_step,
            "_moved": (options_of_copy(member.settings), self.version),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take torch's part of a state; open a session for a copy.

        Raises:
            FarstepError: the session of the copy cannot be opened.
        """
        state = completed(self.torch_class, state)
        moved = state.pop("_moved", None)
        super().__setstate__(state)
        if moved is not None:
            options, version = moved
            try:
                self._open(settings_of_copy(options), self.state, version)
            except ValueError as exc:
                if isinstance(exc, FarstepError):
                    raise
                raise TensorMismatch(
                    f"The copy's parameters have another shape by now than their state ({exc}).",
                    remedy="Copy the optimizer when none of its parameters is away, as offloaded ones are.",
                    side="client",
                ) from exc
            self.last_step = state["last_step"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = deepcopy(self.__getstate__(), memo)
        options, version = state.pop("_moved")
        settings = self._membership.settings
        here: RemoteOptions = {"token": settings.token, "transport": settings.transport}
        state["_moved"] = ({**options, **here}, version)
        copied.__setstate__(state)
        return copied
