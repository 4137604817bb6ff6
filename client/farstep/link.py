"""The link of a worker to its session: one interface, over HTTP (`farstep.http_link`) or in this process (embedded).

A link is opened for a list of parameters, sends their gradients, and receives their new values. The parameters are
updated in place: same storage, same strides, version counter bumped. Gradients are never changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from farstep.heartbeat import Heartbeat
from farstep.overlap import Overlapped
from farstep.protocol.consistency import Consistency, to_options
from farstep.protocol.durability import Durability, to_document
from farstep.protocol.fields import FieldKind, State
from farstep.protocol.messages import Evaluation
from farstep.protocol.policies import NO_POLICIES, Policies
from farstep.protocol.receipt import StepReport
from farstep.settings import KernelChoice, NonFinitePolicy

Options = Mapping[str, Any]
Args = ParamSpec("Args")
Result = TypeVar("Result")


def in_ordinary_memory(method: Callable[Args, Result]) -> Callable[Args, Result]:
    """Have a link's method allocate ordinary tensors, also inside `torch.inference_mode`.

    Tensors made in that mode can be written to only there, and those of a session outlive it.
    """

    @wraps(method)
    def called(*args: Args.args, **named: Args.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return method(*args, **named)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **named)

    return called


@dataclass(frozen=True, slots=True)
class Start:
    """The initial state and version of a new session; an existing session ignores it.

    Attributes:
        state: given the optimizer's state fields, returns one entry per parameter, None for a parameter without state;
            None for a session without state.
        version: the version the session starts at.
    """

    state: Callable[[Mapping[str, FieldKind]], Sequence[State | None]] | None = None
    version: int = 0


@dataclass(frozen=True, slots=True)
class Parameter:
    """Describe one parameter of a session: name, shape, dtype (such as `float32`) and param group."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """Describe a session completely. Workers with equal specs share it; another spec is refused."""

    name: str
    optimizer: str
    groups: tuple[Options, ...]
    parameters: tuple[Parameter, ...]
    consistency: Consistency
    nonfinite: NonFinitePolicy
    kernel: KernelChoice
    policies: Policies = NO_POLICIES
    durability: Durability | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the spec as the JSON document of `POST /v1/sessions`."""
        policy = self.policies.to_options()
        return {
            "name": self.name,
            "optimizer": self.optimizer,
            "groups": [dict(group) for group in self.groups],
            "segments": [
                {"name": each.name, "shape": list(each.shape), "dtype": each.dtype, "group": each.group}
                for each in self.parameters
            ],
            "consistency": to_options(self.consistency),
            "nonfinite": self.nonfinite,
            "kernel": self.kernel,
            **({"policy": policy} if policy else {}),
            **({} if self.durability is None else {"durability": to_document(self.durability)}),
        }


class Link(ABC):
    """One worker's link to one session."""

    @property
    @abstractmethod
    def version(self) -> int:
        """The version of the parameters this worker holds."""

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, FieldKind]:
        """The optimizer's state fields under torch's names."""

    @property
    @abstractmethod
    def durability(self) -> str:
        """What is kept of the session on disk, as text; "" where a server of an older release does not say."""

    @property
    @abstractmethod
    def has_initial_state(self) -> bool:
        """Whether a parameter has state before its first step (Adagrad)."""

    @property
    def joined_options(self) -> list[Options] | None:
        """The options of each group that were in force when this worker joined; None where it created the session."""
        return None

    @abstractmethod
    def options_in_force(self) -> list[Options]:
        """Return the options of each param group that are in force in the session.

        Raises:
            FarstepError: the session is gone, or no answer came.
        """

    @abstractmethod
    def push(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None = None,
    ) -> StepReport:
        """Send one gradient per parameter (None without one) and changed group options; update the parameters.

        Args:
            gradients, groups: see above. Where each push has its own options, `groups` has all options of every group.
            evaluation: what the closure returned, for an optimizer that needs it.

        Raises:
            FarstepError: the session refused the push, or `Unavailable`: no answer came in time. The parameters are
                unchanged.
        """

    def begin_push(self, order: Sequence[int], groups: Mapping[int, Options]) -> Overlapped | None:
        """Begin to push gradients that are still being computed, for the next `push`; None if it would not help.

        Args:
            order: the parameters that will have gradients, in the order in which these become final.
            groups: changed group options.
        """
        return None

    @abstractmethod
    def skip(self, groups: Mapping[int, Options]) -> StepReport:
        """Report that this worker's gradients overflowed: all workers skip the step, and waiting ones continue.

        Raises:
            FarstepError: see `push`.
        """

    @abstractmethod
    def pull(self) -> int:
        """Update the parameters to the session's current version and return it."""

    @abstractmethod
    def write(self, parameters: Sequence[int] = (), state: Mapping[int, State | None] | None = None) -> int:
        """Replace the session's values of some parameters by this worker's, or the state of some, as one write.

        Args:
            parameters: indices of parameters whose values are sent, if no state is.
            state: new state by the parameter's index, None to remove it.
        """

    @abstractmethod
    def append(self, options: Options, parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> bool:
        """Add a param group to the session, at its end, and return whether the session grew by it.

        It did not if another worker has added this group before: then all parameters here, the group's included, are
            updated to the session's current version.

        Args:
            options: the group's options.
            parameters, tensors: the group's parameters; `tensors` are updated in place from now on.

        Raises:
            OptionsDiffer: the session has another group in this place.
            FarstepError: the session refused the group, or `Unavailable`: no answer came in time. The link is
                unchanged.
        """

    @abstractmethod
    def edited(self, addresses: list[int]) -> list[int]:
        """Return which parameters differ from the session's; none where it reads the parameters' own memory.

        Args:
            addresses: where each parameter's memory begins now.
        """

    def settle_edits(self, addresses: list[int]) -> None:
        """Send edited parameters to the session, at the latest before the next push or skip is applied.

        Args:
            addresses: where each parameter's memory begins now.
        """
        if edited := self.edited(addresses):
            self.write(edited)

    @abstractmethod
    def stand_in(self, index: int) -> Tensor | None:
        """Return a stand-in for a parameter that temporarily has another shape or dtype; None without one.

        Where values may be compared or copied, it has the session's, as far as this worker knows them.
        """

    @abstractmethod
    def rebind(self, parameters: Sequence[Tensor]) -> bool:
        """Replace the parameters by other tensors of the same shapes and dtypes; return whether that is possible.

        The session does not change; values that differ count as edited.
        """

    @abstractmethod
    def heartbeat(self, *, once: bool = False) -> Heartbeat:
        """Renew this worker's lease without a write; may be called from any thread.

        Args:
            once: do not retry, and take a few seconds at most.

        Raises:
            SessionLost, Fenced: the session is gone, or another process has this worker's name.
            Unavailable: no answer came.
        """

    @property
    @abstractmethod
    def consistency(self) -> Consistency:
        """The session's consistency mode, as this worker last heard of it."""

    @abstractmethod
    def set_consistency(self, mode: Consistency) -> None:
        """Switch the session to another consistency mode.

        Raises:
            FarstepError: the session refused it, or `Unavailable`.
        """

    @abstractmethod
    def stateful(self) -> tuple[int, list[bool]]:
        """Return the session's version, and for each parameter whether it has optimizer state; without any tensor."""

    @abstractmethod
    def read_state(self, indices: Sequence[int]) -> list[State | None]:
        """Return a copy of the optimizer state of some parameters, in ascending order, None for those without."""

    @abstractmethod
    def read_view(self, view: str) -> list[Tensor]:
        """Return a copy of a view, such as the average of the parameters: one tensor for each of them.

        Raises:
            InvalidOption: the session has no such view.
        """

    @abstractmethod
    def write_view(self, view: str, values: Sequence[Tensor]) -> None:
        """Replace a view by tensors of the parameters' shapes and dtypes."""

    @abstractmethod
    def rejoin(self, start: Start) -> bool:
        """Join the session again, or create it from `start` if it is gone; return whether it was created."""

    @abstractmethod
    def close(self) -> None:
        """Leave; a private session is removed. The link cannot be used afterwards."""
