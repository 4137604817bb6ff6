"""Options of an optimizer as a frozen record that checks itself.

    options (a mapping, from JSON, msgpack or a param group)
        │  Hyper.from_options    unknown key, wrong type, not finite: InvalidOption naming it
        ▼
    Hyper (frozen)               out of torch's range: InvalidOption with torch's own sentence
        │  Hyper.to_options
        ▼
    options again, equal to the first with the defaults filled in

Each update rule declares its own record, with torch's names and defaults, by deriving from `Hyper`. torch checks ranges
only in an optimizer's constructor: it accepts what a scheduler or a user later puts into a param group, even a learning
rate of -1e-19 at the end of a cosine. `edited=True` marks such options; their types are checked, their ranges are not.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any, ClassVar, Self

from farstep.errors import InvalidOption

Option = float | int | bool | str | None | tuple[float | None, ...]
"""The types of an option's value."""


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Base class of the options of each rule."""

    rule: ClassVar[str] = "optimizer"

    edited: InitVar[bool] = False

    def __post_init__(self, edited: bool) -> None:
        for field in fields(self):
            _check_type(self.rule, field.name, getattr(self, field.name), _annotations(type(self))[field.name])
        self.check_possible()
        if not edited:
            self.check_ranges()
        _check_finite(self)

    def check_possible(self) -> None:
        """Refuse options that cannot work on a server, even if torch accepts them.

        Raises:
            InvalidOption: naming the option.
        """

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and with the same messages.

        Raises:
            InvalidOption: a value is out of range.
        """

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, edited: bool = False) -> Self:
        """Read a record from a mapping; missing options get torch's defaults, lists become tuples.

        Args:
            options: values by option name, as received in msgpack or JSON.
            edited: the options were changed after construction, where torch does not check ranges.

        Raises:
            InvalidOption: an option is unknown, of a wrong type, not finite, or out of range.
        """
        known = _annotations(cls)
        for name in options:
            if name not in known:
                raise InvalidOption(
                    f"{cls.rule} has no option {name!r:.100}.", field=str(name), remedy=f"It knows {', '.join(known)}."
                )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else _number(value) for name, value in options.items()
        }
        return cls(**values, edited=edited)

    def to_options(self) -> dict[str, Option]:
        """Return every option by name; `from_options` turns them into an equal record."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class CommonHyper(Hyper):
    """The options that nearly every optimizer has.

    Attributes:
        maximize: climb instead of descend.
        foreach: kept for the client; the server has one kernel for all tensors.
        differentiable: refused when true, since autograd cannot reach through a server.
    """

    maximize: bool = False
    foreach: bool | None = None
    differentiable: bool = False

    def check_possible(self) -> None:
        """Refuse a step that autograd would have to run through."""
        if self.differentiable:
            raise InvalidOption(
                "differentiable=True is not possible: autograd cannot reach through a step that runs on a server.",
                field="differentiable",
                remedy="Use torch.optim for a differentiable step.",
            )


def _number(value: Any) -> Any:
    """Return a huge int, which torch's operations do not take, as a float; everything else unchanged."""
    if type(value) is int and abs(value) >= 2**53:
        return float(value) if abs(value) < 2**1023 else math.inf
    return value


def in_range(message: str, inside: bool, *, field: str) -> None:
    """Raise `InvalidOption` with torch's message unless the value is inside its range."""
    if not inside:
        raise InvalidOption(message, field=field)


_ANNOTATIONS: dict[type[Hyper], dict[str, Any]] = {}


def _annotations(cls: type[Hyper]) -> dict[str, Any]:
    found = _ANNOTATIONS.get(cls)
    if found is None:
        hints = typing.get_type_hints(cls)
        found = _ANNOTATIONS[cls] = {field.name: hints[field.name] for field in fields(cls)}
    return found


def _check_type(rule: str, name: str, value: object, annotation: Any) -> None:
    if not _is_a(value, annotation):
        raise InvalidOption(f"{rule}: {name}={value!r:.100} is not {_words(annotation)}.", field=name)


def _is_a(value: object, annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, each) for each in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return isinstance(value, tuple) and all(_is_a(each, inner[0]) for each in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_is_a, value, inner))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _words(annotation: Any) -> str:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " or ".join(_words(each) for each in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)
        return "a list of numbers" if inner[-1] is Ellipsis else f"a list of {len(inner)} numbers"
    return {float: "a number", int: "an integer", bool: "true or false", str: "text", types.NoneType: "None"}[
        annotation
    ]


def _check_finite(hyper: Hyper) -> None:
    for name, value in hyper.to_options().items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not _is_finite(number):
                raise InvalidOption(f"{hyper.rule}: {name}={number} is not finite.", field=name)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond the largest float
        return False
