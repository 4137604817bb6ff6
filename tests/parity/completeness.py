"""Find what torch has and farstep or the table of cases has not: optimizers, options, and options without a case.

torch is asked, not a list of ours: its classes by their base class, their options by their signatures. An older torch
asks for less, so nothing is missing there. What farstep has beyond torch is a fault only if this torch is at least
as new as the one that farstep follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import ModuleType

import torch

from tests.parity.cases import Case, parameters_of

FOLLOWED = (2, 13)
"""The torch whose signatures farstep has."""

ABSENT: dict[str, str] = {}
"""Optimizers of torch that farstep does not have, each with the reason."""


def is_current(version: str) -> bool:
    """Return whether a torch is at least as new as the one that farstep follows."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= FOLLOWED


def optimizers_of(module: ModuleType) -> dict[str, type[torch.optim.Optimizer]]:
    """Return the optimizers that a module such as `torch.optim` offers, by name."""
    return {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
        if not name.startswith("_")
    }


def missing_optimizers(theirs: Iterable[str], ours: Iterable[str], absent: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the optimizers there are, in words."""
    theirs, ours = set(theirs), set(ours)
    return [
        *(f"torch has {name}, farstep has not" for name in sorted(theirs - ours - set(absent))),
        *(f"farstep has {name}, which is said to be absent: {absent[name]}" for name in sorted(ours & set(absent))),
    ]


def missing_options(theirs: type, ours: type, *, current: bool) -> list[str]:
    """Return where a constructor of ours differs from torch's, in words.

    Args:
        current: whether this torch has everything that farstep follows.
    """
    there, here = parameters_of(theirs), parameters_of(ours)
    own = [name for name, each in here.items() if each.kind is inspect.Parameter.VAR_KEYWORD]
    found = []
    for name, option in there.items():
        if name not in here:
            found.append(f"{theirs.__name__} of torch takes {name}={option.default!r}, farstep's does not")
        elif (here[name].kind, here[name].default) != (option.kind, option.default):
            found.append(f"{theirs.__name__} of torch takes {_said(option)}, farstep's {_said(here[name])}")
    if extra := sorted(here.keys() - there.keys() - set(own)) if current else []:
        found.append(f"{theirs.__name__} of farstep takes {', '.join(extra)}, torch's does not")
    shared = [[name for name in each if name in here and name in there] for each in (there, here)]
    if shared[0] != shared[1]:
        found.append(f"{theirs.__name__} of torch takes its options in the order {shared[0]}, farstep's in {shared[1]}")
    return found


def _said(option: inspect.Parameter) -> str:
    return f"{option.name}={option.default!r} {option.kind.description}"


def uncovered_options(theirs: type, cases: Iterable[Case], skipped: Mapping[str, str]) -> list[str]:
    """Return the options that no case sets to another value than the default, unless they are skipped for a reason."""
    changed = {
        option
        for case in cases
        for option, value in case.options.items()
        if case.name == theirs.__name__ and option in parameters_of(theirs)
        if _differs(value, parameters_of(theirs)[option].default)
    }
    return [
        f"{theirs.__name__} takes {option}, and no case sets it"
        for option in parameters_of(theirs)
        if option not in changed and option not in skipped
    ]


def _differs(value: object, default: object) -> bool:
    return type(value) is not type(default) or value != default
