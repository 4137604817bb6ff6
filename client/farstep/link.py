"""A worker's way to its session: one interface, over HTTP (`farstep.http_link`) or in this process (embedded).

A link is opened once for a list of parameters and from then on moves their gradients there and their new values back.
The parameters are updated in place: same storage, same strides, version counter bumped. Gradients are never changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, cast

from torch import Tensor

from farstep.consistency import Consistency, to_options
from farstep.errors import FarstepError
from farstep.fields import EVERYWHERE, FieldKind, Shapes
from farstep.messages import Evaluation, Receipt
from farstep.overlap import Overlapped
from farstep.settings import KernelChoice, NonFinitePolicy, Place

Options = Mapping[str, Any]
State = dict[str, Tensor | float]
"""The state of one parameter: tensors of the shapes that `farstep.fields` says, and numbers as floats."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a session begins with beside the parameters; ignored by one that has begun.

    Attributes:
        state: given the optimizer's state fields, returns one entry per parameter, None where it has no state; None
            for a session without any state.
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
    """Describe a session completely. Two workers with equal specs share it; with others the second is refused."""

    name: str
    optimizer: str
    groups: tuple[Options, ...]
    parameters: tuple[Parameter, ...]
    consistency: Consistency
    nonfinite: NonFinitePolicy
    kernel: KernelChoice

    def to_document(self) -> dict[str, Any]:
        """Return the spec as the JSON document of `POST /v1/sessions`."""
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
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Say what one `step()` did.

    Attributes:
        version: the session's version after it.
        staleness: steps between the version the gradient was computed on and the one it was applied to.
        applied: whether the parameters changed by it; not so if a worker skipped the step, or for the `reason` below.
        duplicate: whether the server had seen this push before, so that this answer is the first one's receipt.
        earlier: what became of a write before this one that had got no answer and was not repeated: `applied`, or
            `dropped` because it never arrived or its barrier was given up. None if there was none.
        contributors: the workers whose gradients made the step.
        divisor: what the sum of the gradients was divided by.
        kernel: `reference` or `fused`.
        again: the step goes on with another evaluation of the closure, at the new parameters.
        reason: why it was not applied, if that was because its gradient was `late` or `stale`; see `farstep.Sync` and
            `farstep.Bounded`. The parameters are the session's present ones, and training goes on from there.
        weight: what the gradient counted, or the learning rate was multiplied by, because it was stale.
        bytes_sent: payload bytes of the gradients.
        bytes_received: payload bytes of the parameters.
        attempts: how often the push was sent.
        bytes_overlapped: those among `bytes_sent` that had been sent when `step()` began.
        overlap: `streamed` if the push was begun during the backward pass; why it was given up, if it had been begun
            and the step was an ordinary one; "" if it had not been begun.
        path: how the tensors moved: `bodies` of requests, or `shared memory`; "" if they did not.
        seconds: where the time went: `total`; on the server `queue` (waiting for its turn), `receive`, `check`
            (for NaN and Inf), `barrier`, `kernel`; and here `send`, the answer's way back as the client saw it, and
            `copy`, from where it arrived into the parameters.
    """

    version: int
    staleness: int = 0
    applied: bool = True
    duplicate: bool = False
    earlier: Literal["applied", "dropped"] | None = None
    contributors: tuple[str, ...] = ()
    divisor: int = 1
    kernel: str = ""
    again: bool = False
    reason: str = ""
    weight: float = 1.0
    bytes_sent: int = 0
    bytes_received: int = 0
    attempts: int = 1
    bytes_overlapped: int = 0
    overlap: str = ""
    path: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        receipt: Receipt,
        *,
        duplicate: bool,
        earlier: Literal["applied", "dropped"] | None,
        bytes_sent: int,
        bytes_received: int,
        attempts: int,
        seconds: Mapping[str, float],
        path: str = "",
    ) -> StepReport:
        """Return what a receipt says of a step, with what the worker knows of the way there and back."""
        return cls(
            version=receipt.version,
            staleness=receipt.staleness,
            applied=receipt.applied,
            duplicate=duplicate,
            earlier=earlier,
            contributors=receipt.contributors,
            divisor=receipt.divisor,
            kernel=receipt.kernel,
            again=receipt.again,
            reason=receipt.reason,
            weight=receipt.weight,
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            attempts=attempts,
            path=path,
            seconds=seconds,
        )


class Link(ABC):
    """One worker's way to one session."""

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
    def eager(self) -> bool:
        """Whether a parameter has state before its first step (Adagrad)."""

    @abstractmethod
    def push(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None = None,
    ) -> StepReport:
        """Send one gradient per parameter (None: it has none) and changed group options; update the parameters.

        Args:
            gradients, groups: as said above.
            evaluation: what the closure returned, for an optimizer that asks for it.

        Raises:
            FarstepError: what the session refused, or `Unavailable` when no answer came in time. The parameters are
                then as they were.
        """

    def begin_push(self, order: Sequence[int], groups: Mapping[int, Options]) -> Overlapped | None:
        """Begin to push gradients that are still being computed, for the next `push`; None where that is no gain.

        Args:
            order: the parameters whose gradients there will be, in the order in which they become final.
            groups: changed group options.
        """
        return None

    @abstractmethod
    def skip(self, groups: Mapping[int, Options]) -> StepReport:
        """Say that this worker's gradients overflowed: nobody takes the step, and whoever waits for it goes on.

        Raises:
            FarstepError: see `push`.
        """

    @abstractmethod
    def pull(self) -> int:
        """Bring the parameters to the session's current version and return it."""

    @abstractmethod
    def write(self, parameters: Sequence[int] = (), state: Mapping[int, State | None] | None = None) -> int:
        """Replace the session's values of some parameters by this worker's, or the state of some, in one step.

        Args:
            parameters: indices of parameters whose values are sent, if no state is.
            state: new state by the parameter's index, None where it shall have none.
        """

    @abstractmethod
    def append(self, options: Options, parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> bool:
        """Add a param group to the session, at its end, and return whether the session grew by it.

        If another worker has added this group before, it did not: the parameters of the group, and those that are here
        already, are then brought to the session's current version.

        Args:
            options: the group's options.
            parameters, tensors: the group's parameters; `tensors` are updated in place from now on.

        Raises:
            OptionsDiffer: the session has another group in its place.
            FarstepError: what the session refused, or `Unavailable` when no answer came in time. The link is then as it
                was.
        """

    @abstractmethod
    def edited(self, addresses: list[int]) -> list[int]:
        """Return which parameters the session has other values of; none where it reads the parameters' own memory.

        Args:
            addresses: where each parameter's memory begins now.
        """

    def settle_edits(self, addresses: list[int]) -> None:
        """Bring edited parameters to the session, at the latest before the push or skip that follows is applied.

        Args:
            addresses: where each parameter's memory begins now.
        """
        if edited := self.edited(addresses):
            self.write(edited)

    @abstractmethod
    def rebind(self, parameters: Sequence[Tensor]) -> bool:
        """Take other tensors of the same shapes and dtypes in the parameters' place; return whether that can be.

        The session is as it was; what differs counts as edited.
        """

    @property
    @abstractmethod
    def consistency(self) -> Consistency:
        """The session's consistency mode, as this worker last heard of it."""

    @abstractmethod
    def set_consistency(self, mode: Consistency) -> None:
        """Let the session go on in another consistency mode.

        Raises:
            FarstepError: what the session refused, or `Unavailable`.
        """

    @abstractmethod
    def stateful(self) -> tuple[int, list[bool]]:
        """Return the session's version, and for each parameter whether it has optimizer state; moves no tensors."""

    @abstractmethod
    def read_state(self, indices: Sequence[int]) -> list[State | None]:
        """Return a copy of the optimizer state of some parameters, ascending, None where one has none."""

    @abstractmethod
    def rejoin(self, start: Start) -> bool:
        """Join the session again, creating it anew from `start` if it is gone; return whether it was created."""

    @abstractmethod
    def close(self) -> None:
        """Leave; a private session is removed. The link cannot be used afterwards."""


def worth_sending(fields: Mapping[str, FieldKind], states: Iterable[State | None]) -> list[str]:
    """Return the fields but for those that no parameter has, where a parameter may go without."""
    had = {name for own in states if own for name in own}
    return [name for name, kind in fields.items() if kind in EVERYWHERE or name in had]


def shapes_of(fields: Mapping[str, FieldKind], states: Mapping[int, State | None]) -> Shapes:
    """Return the shapes of free fields; None for those that are numbers.

    Raises:
        ValueError: another parameter than the first has them.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    for index, own in states.items():
        for name, value in (own or {}).items():
            if fields[name] != "free":
                continue
            if index:
                raise ValueError(f"loaded state dict has {name!r} for parameter {index}; the first one's holds it")
            shapes[name] = tuple(value.shape) if isinstance(value, Tensor) else None
    return shapes


def open_link(spec: SessionSpec, parameters: Sequence[Tensor], place: Place, start: Start | None = None) -> Link:
    """Open the link that `place` asks for: to a server, or embedded in this process.

    Raises:
        FarstepError: the session exists with other options, or the server does not answer in time.
    """
    if place.server is not None:
        from farstep.http_link import HttpLink

        return HttpLink(spec, parameters, place, start)
    for entry in entry_points(group="farstep.hosts", name="embedded"):
        return cast(Link, entry.load()(spec, parameters, place, start))
    raise FarstepError(
        "No server is named and the embedded host is not installed.",
        remedy="Give server=..., set FARSTEP_SERVER, or install farstep completely.",
        side="client",
    )
