"""Rounds of local steps, counted by a hook of the inner optimizer: the common part of `LocalSGD` and `DiLoCo`.

    __enter__ ──► join the session, give the model its parameters, and count the inner optimizer's steps
    step      ──► count it; the last one of a round synchronises
    sync      ──► committed       the model has the new parameters, and a round begins
              ──► refused         neither the model nor the count has changed; the next step tries again, and the next
                                  pseudo-gradient includes that step
              ──► no answer       as refused, but the same pseudo-gradient is repeated until its outcome is known:
                                  a new one would count the common part twice
    __exit__  ──► stop counting. The current round is not finished: the model keeps its steps and the count is kept;
                  entering again continues it, `sync()` ends it

The session's optimizer is an ordinary farstep optimizer over θ, a copy of the parameters (`round_start`), so a round
survives whatever an optimizer survives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from farstep.errors import FarstepError, NonFinite, TensorMismatch, invalid_option
from farstep.http_link.sequence import is_refusal
from farstep.local_sgd.pending import Pending
from farstep.local_sgd.round_start import RoundStart, follow_, shapes_and_dtypes
from farstep.optim.base import RemoteOptimizer
from farstep.optim.moving import remote as moved
from farstep.optim.names import named_parameters, plain_names
from farstep.optim.options import arguments
from farstep.optim.scaling import scaling_of
from farstep.protocol.plain import pythons_own
from farstep.protocol.receipt import StepReport
from farstep.settings import RemoteOptions, resolve
from farstep.tensors import overlapping


class Rounds:
    """Base class of `LocalSGD` and `DiLoCo`.

    Attributes:
        local_step: local steps of the round under way.
        every: local steps in a round.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        outer: torch.optim.Optimizer,
        every: int,
        remote: RemoteOptions,
    ) -> None:
        every = pythons_own(every)
        if type(every) is not int or every < 1:
            raise invalid_option(f"Invalid every: {every!r}. Must be an int of at least 1.", "every")
        try:
            resolve(remote)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__() got an {error}") from None
        self.every = every
        self.local_step = 0
        self._model = model
        self._inner = _hooked(inner)
        self._remote = remote
        self._parameters = self.synchronised(model)
        self._template = outer
        self._check_outer()
        names = {p: name for name, p in self._parameters.items()}
        self._names = [[names[p] for p in group["params"]] for group in outer.param_groups]
        self._outer: RemoteOptimizer | None = None
        self._hook: RemovableHandle | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._pending: Pending | None = None
        self._closed = False

    @staticmethod
    def synchronised(model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters of a model that are synchronised, under their names without wrappers.

        Raises:
            InvalidOption: there are none.
        """
        found = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
        if not found:
            raise invalid_option("The model has no parameter that requires gradients.", "model")
        return found

    def _check_outer(self) -> None:
        ours = set(self._parameters.values())
        theirs = {p for group in self._template.param_groups for p in group["params"]}
        if ours != theirs:
            what = "lacks parameters of the model" if ours - theirs else "has parameters that the model has not"
            raise invalid_option(
                f"The outer optimizer {what}.", "outer_optimizer", "Give it those that require gradients, all of them."
            )

    # -- the context ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Join the session on first entry, and count the inner optimizer's steps.

        Raises:
            FarstepError: the session cannot be joined, or was left, or the context is already entered.
        """
        if self._closed:
            raise FarstepError("This context was closed.", remedy="Make a new one to join again.", side="client")
        if self._hook is not None:
            raise FarstepError("This context is entered already.", remedy="Leave it first.", side="client")
        self._follow()
        if self._outer is None:
            self._join()
        self._hook = self._inner.register_step_post_hook(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def close(self) -> None:
        """Leave the session, also when this object is freed. A second call does nothing."""
        self.__exit__(None, None, None)
        if self._outer is not None:
            self._outer.close()
            self._closed = True

    def _count(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Count a step that was taken; some optimizers skip the step themselves when GradScaler finds an overflow.

        A nested step, such as `super().step()` of a user's class, is a part of the outer one.
        """
        if _is_nested(optimizer):
            return
        with scaling_of(vars(optimizer)) as scaling:
            if scaling.overflowed:
                return
        self._check_training("A step")
        self.local_step += 1
        if self._pending is not None:
            self._pending.steps += 1
        if self.local_step >= self.every:
            self.sync()

    # -- the session ------------------------------------------------------------------------------------------------

    @property
    def outer(self) -> RemoteOptimizer:
        """The session's optimizer, over copies of the model's parameters; for schedulers of the outer learning rate.

        Raises:
            FarstepError: before the context was entered for the first time.
        """
        if self._outer is None:
            raise FarstepError("There is no session as yet.", remedy="Enter the context first.", side="client")
        return self._outer

    @property
    def version(self) -> int:
        """The session's version at the start of the current round."""
        return self.outer.version

    @property
    def last_sync(self) -> StepReport | None:
        """The report of the last synchronisation, None before the first one."""
        return self.outer.last_step

    @torch.no_grad()
    def sync(self) -> StepReport:
        """End the current round, however many steps it has: exchange its result, and return the report.

        Raises:
            InvalidOption: the model's parameters have changed; it names the first.
            FarstepError: the session refused it, or `Unavailable`. The model and the count are unchanged, and the next
                local step, or `sync()`, tries again.
        """
        self._check_training("sync()")
        self._follow()
        _check_no_shared_memory(self._parameters)
        outer, pending = self.outer, self._pending
        if pending is None:
            pending = self._pending = Pending.of(outer, self._start.tensors, list(self._parameters.values()))
        sent = pending.sent(self._start.tensors)
        try:
            pending.push(outer, self._start.tensors)
        except BaseException as error:
            if is_refusal(error) or isinstance(error, NonFinite):  # which encoding for the wire can cause here
                self._begin(self.local_step)
            raise
        self._start.take_(sent)
        self._begin(pending.steps)
        assert outer.last_step is not None
        return outer.last_step

    def pull(self) -> int:
        """Drop the steps of the round: set the model to the session's current version, and return it.

        Raises:
            FarstepError: see `sync`.
        """
        self._follow()
        version = self.outer.pull()
        self._start.take_()
        self._begin(0)
        return version

    def rejoin(self, state_dict: Mapping[str, Any] | None = None) -> bool:
        """Join the session again after `SessionLost` or `Fenced`; return whether it had to be created.

        A created session begins with the parameters at the start of the round, which continues; its optimizer has the
        state of `state_dict`, as returned by `state_dict()`, or none. An existing session replaces the model's
        parameters, and a new round begins.

        Raises:
            FarstepError: the session cannot be joined.
        """
        self._follow()
        created = self.outer.rejoin(None if state_dict is None else state_dict["outer"])
        if created:
            self._begin(self.local_step)
        else:
            self._start.take_()
            self._begin(0)
        return created

    @contextmanager
    def swap_to(self, view: str) -> Iterator[None]:
        """Give the model the values of a view inside a `with` block, and restore its own after it, bit for bit.

        Local steps and `sync()` are refused inside.

        Raises:
            InvalidOption: the session has no such view.
            FarstepError: the session's optimizer has a view's values already, or no answer came in time.
        """
        self._follow()
        with self.outer.swap_to(view), self._start.shown():
            yield

    def _check_training(self, what: str) -> None:
        """Refuse an operation that would mistake the values of a view for those at the start of the round."""
        if shown := self.outer.shown:
            raise FarstepError(f"{what} inside swap_to({shown!r}).", remedy="Leave the block first.", side="client")

    # -- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to continue this round, beside the states of model and inner optimizer.

        That is `local_step`; `parameters`, those at the start of the round by name; and `outer`, the session's
        optimizer state in torch's form. A session that still exists has all but `local_step`.

        Raises:
            FarstepError: inside `swap_to`, or no answer came in time.
        """
        self._check_training("state_dict()")
        outer = self.outer
        return {
            "local_step": self.local_step,
            "parameters": self._start.values(),
            "outer": outer.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, before the context is entered for the first time.

        A session created on entering begins with these parameters and this optimizer state. An existing one keeps its
            own: if they are the same parameters, the round continues; otherwise other workers have stepped meanwhile,
            so the model takes the session's parameters and a new round begins.

        Raises:
            FarstepError: the session is joined already.
            ValueError: the state is another model's.
        """
        if self._outer is not None:
            raise FarstepError(
                f"Session {self._outer.session!r} is joined already, and has its own parameters and state.",
                remedy="Load before entering the context for the first time.",
                side="client",
            )
        saved = state_dict["parameters"]
        parameters = dict(zip(plain_names(list(saved)), saved.values(), strict=True))  # it may be an older release's
        if shapes_and_dtypes(parameters) != shapes_and_dtypes(self._parameters):
            raise ValueError("loaded state dict has parameters of other names, shapes or dtypes than the model's")
        self._loaded = {**state_dict, "parameters": parameters}
        self.local_step = int(state_dict["local_step"])

    # -- inside -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _join(self) -> None:
        """Open the session, with its initial contents if it is new; the model continues a loaded round if it can."""
        _check_no_shared_memory(self._parameters)
        loaded = self._loaded
        begin = self._parameters if loaded is None else loaded["parameters"]
        self._start = RoundStart(self._parameters, begin)
        kind = type(self._template)
        template = kind(
            self._start.groups(self._template.param_groups, self._names), **arguments(kind, self._template.defaults)
        )
        if loaded is not None:
            template.load_state_dict(dict(loaded["outer"]))
        elif self._template.state:
            template.load_state_dict(self._template.state_dict())
        self._outer = moved(template, **self._remote)
        if loaded is None or not self._start.has(loaded["parameters"]):
            self._start.take_()
            self._begin(0)

    def _follow(self) -> None:
        follow_(self._parameters, self._model, self._inner)

    def _begin(self, local_step: int) -> None:
        """Set the count of local steps, with no pseudo-gradient pending."""
        self.local_step = local_step
        self._pending = None
        self._start.forget_gradients_()


_STEP: Final = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
"""The code that torch wraps around the `step` of each class; it calls the hooks."""


def _is_nested(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the step of the calling hook is within another step of the same optimizer.

    The stack shows it, also after an exception; a count of begun and ended steps would not return to zero after a
    failed step.
    """
    frame, steps = sys._getframe(1).f_back, 0
    while frame is not None and steps < 2:
        steps += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def _hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that has the step hooks: Accelerate's wrapper has none of its own."""
    while "_optimizer_step_post_hooks" not in vars(optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]  # of the wrapper
    return optimizer


def _check_no_shared_memory(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that share memory: the session's values of one would overwrite the other.

    Raises:
        TensorMismatch: naming two.
    """
    names = list(parameters)
    for one, other in overlapping(list(parameters.values())):
        raise TensorMismatch(
            f"Parameters {names[one]!r} and {names[other]!r} of the model share memory.",
            remedy="Tie them as one Parameter (b.weight = a.weight) before the context is made.",
            field=names[other],
            side="client",
        )
