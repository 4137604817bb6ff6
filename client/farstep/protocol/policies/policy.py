"""A policy: one thing that a session does around a step, with its options, their checks, and what it does to gradients.

    (gradients) ──► (gradients, facts)

A policy is a frozen dataclass. Its fields are its options, under the names that users, the wire and session files have
for them, and their defaults ask for nothing. A step goes through the policies of its session in the order of
`farstep.protocol.policies.table`. It gives each of them the gradients that the one before has returned, as `Gradients`,
which are maps over memory that is there:

    tensors()         to look at, for a norm
    mapped(change)    other elements in the place of these
    check_finite()    what a policy says that has found NaN or Inf on its way

Facts are numbers for the receipt, such as the norm before it was clipped.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from farstep.errors import invalid_option
from farstep.protocol.plain import take_pythons_own_

if TYPE_CHECKING:
    from torch import Tensor

Facts = tuple[tuple[str, float], ...]
"""Numbers that a receipt says of a step, by name."""


class Gradients(ABC):
    """The gradients of a step, on whatever device they are. Of sparse ones, each row is named once."""

    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """Return the gradient of each parameter that has one, the values of a sparse one, only to be looked at."""

    @abstractmethod
    def mapped(self, change: Callable[[Tensor, Tensor], object]) -> Gradients:
        """Return gradients with other elements in the place of these.

        Args:
            change: called with a run of elements and with memory of the same shape and dtype for what is to replace
                them, which may be the same memory: `torch.sign(source, out=into)`. A run may be a part of a tensor, or
                several of them; missing rows of sparse gradients are in none.
        """

    @abstractmethod
    def check_finite(self) -> None:
        """Leave the policy, and the step, if any of them holds NaN or Inf and the session minds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(ABC):
    """What all policies have; without arguments, one does nothing.

    `import farstep` imports every policy, and must not import torch: one that needs it imports it in its methods.
    """

    name: ClassVar[str] = ""
    """The option that asks for the policy, if it is not what it is by default."""
    facts: ClassVar[tuple[str, ...]] = ()
    """The names of the facts that it has for a receipt."""
    looks: ClassVar[bool] = True
    """Whether it looks at gradients before it changes them, as for a norm. They must not change in between, so those
    in memory that a worker shares are copied first."""
    finds_nonfinite: ClassVar[bool] = False
    """Whether it calls `check_finite` when it meets NaN or Inf: if it comes first, nothing else looks for them."""
    changes_gradients: ClassVar[bool] = True
    """Whether it is called with the gradients of a step at all."""

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse options that are out of range.

        Raises:
            InvalidOption: made by `invalid`, naming the option.
        """

    def check_parameter(self, name: str, *, is_complex: bool) -> None:  # noqa: B027  # most take any
        """Refuse a parameter whose gradients it cannot take.

        Raises:
            InvalidOption: naming the parameter.
        """

    def __call__(self, gradients: Gradients) -> tuple[Gradients, Facts]:
        """Return the gradients in whose direction to go on, and what is to be said of them."""
        return gradients, ()

    @property
    def asked(self) -> bool:
        """Return whether a session was asked for it."""
        return bool(getattr(self, self.name) != self.defaults()[self.name])

    @property
    def options(self) -> Mapping[str, Any]:
        """Return its options."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def defaults(cls) -> Mapping[str, Any]:
        """Return its options as they are where nothing is asked for."""
        return {each.name: each.default for each in fields(cls)}


def is_number(value: object) -> bool:
    """Return whether a value is a number that a float can hold, or infinity."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def check_positive(name: str, value: object) -> None:
    """Refuse what is no number above 0.

    Raises:
        InvalidOption: naming the option.
    """
    if not (is_number(value) and value > 0):  # type: ignore[operator]  # a number by now
        raise invalid_option(f"Invalid {name}: {value!r:.80}. Must be a number above 0.", name)
