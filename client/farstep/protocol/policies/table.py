"""The policies there are, in their order, and those that one session was asked for.

    round ──► accumulate ──► NaN and Inf? ──► clip_value ──► clip_norm ──► the step ──► ema

A round is one push, or the pushes of one barrier, reduced as the consistency mode says. A policy of this package is one
file and its line in `_table`. One of another package is registered in the processes of both sides, before they speak
of it, and comes after those of this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, TypeVar, cast

from farstep.errors import InvalidOption, found_by
from farstep.protocol.policies.clipping import ClipNorm, ClipValue
from farstep.protocol.policies.policy import Policy
from farstep.protocol.policies.stateful import EMA, Accumulate, Average

P = TypeVar("P", bound=Policy)

_table: list[type[Policy]] = [
    Accumulate,
    ClipValue,
    ClipNorm,
    Average,
]


def policies() -> Iterator[type[Policy]]:
    """Yield every kind of policy, in their order."""
    yield from _table


def register(kind: type[Policy]) -> None:
    """Add a policy to those that this process knows, behind them.

    Raises:
        ValueError: an option of it is there already.
    """
    if taken := sorted(set(kind.defaults()) & set(default_options())):
        raise ValueError(f"There is a policy with the option {taken[0]!r} already.")
    _table.append(kind)
    facts.cache_clear()


def unregister(kind: type[Policy]) -> None:
    """Remove a policy that was registered."""
    _table.remove(kind)
    facts.cache_clear()


def default_options() -> Mapping[str, Any]:
    """Return the options of all policies, as they are where nothing is asked for."""
    return {name: value for kind in _table for name, value in kind.defaults().items()}


@cache
def facts() -> tuple[str, ...]:
    """Return the names of all facts that a receipt may have from policies."""
    return tuple(name for kind in _table for name in kind.facts)


@dataclass(frozen=True, slots=True)
class Policies:
    """What a session does around each step; without arguments, nothing.

    Attributes:
        asked: the policies that it was asked for, in their order.
        rounds: the number of rounds that make a step.
        views: the names of what the session keeps beside parameters and optimizer state.
        changing: those that are given the gradients of a step.
        looking: whether any looks at gradients before it changes them.
        as_they_come: whether a step takes the gradients of its round as they are.
    """

    asked: tuple[Policy, ...] = ()
    rounds: int = field(init=False, compare=False, repr=False)
    views: tuple[str, ...] = field(init=False, compare=False, repr=False)
    changing: tuple[Policy, ...] = field(init=False, compare=False, repr=False)
    looking: bool = field(init=False, compare=False, repr=False)
    as_they_come: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        accumulate = self.of_kind(Accumulate)
        derived: dict[str, object] = {
            "rounds": 1 if accumulate is None else accumulate.accumulate,
            "views": () if self.of_kind(Average) is None else (EMA,),
            "changing": tuple(each for each in self.asked if each.changes_gradients),
            "looking": any(each.looks for each in self.asked),
        }
        derived["as_they_come"] = derived["rounds"] == 1 and not derived["changing"]
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Policies:
        """Return the policies that are asked for by options; others among them are not looked at.

        Raises:
            InvalidOption: a value is out of range.
        """
        asked = []
        for kind in _table:
            own = {name: given[name] for name in kind.defaults() if name in given}
            if own and (policy := kind(**own)).asked:
                asked.append(policy)
        return cls(tuple(asked))

    @classmethod
    def from_options(cls, document: Mapping[str, Any]) -> Policies:
        """Return the policies that a document describes.

        Raises:
            InvalidOption: on an option that is of no policy, and on values out of range.
        """
        if unknown := sorted(set(document) - set(default_options())):
            raise InvalidOption(f"Unknown option {unknown[0]!r:.80} of a policy.", field="policy")
        with found_by("server"):
            return cls.of({name: math.inf if value == "inf" else value for name, value in document.items()})

    def to_options(self) -> dict[str, str | float]:
        """Return the options that differ from their defaults as a JSON document, with infinity as a string."""
        before, now = default_options(), self.options()
        asked = {name: value for name, value in now.items() if value != before[name]}
        return {name: "inf" if value == math.inf else value for name, value in asked.items()}

    def options(self) -> dict[str, Any]:
        """Return every option of every policy, as an optimizer takes them."""
        return {**default_options(), **{name: value for each in self.asked for name, value in each.options.items()}}

    def of_kind(self, kind: type[P]) -> P | None:
        """Return the policy of a kind, None if it was not asked for."""
        return cast(P, next((each for each in self.asked if type(each) is kind), None))

    def difference(self, other: Policies) -> str | None:
        """Return in words where other policies differ first, None if nowhere."""
        theirs = other.options()
        for name, value in self.options().items():
            if value != theirs[name]:
                return f"its {name} is {value!r}, not {theirs[name]!r}"
        return None


NO_POLICIES: Final = Policies()
"""Those of a session that was not asked for any."""
