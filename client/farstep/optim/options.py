"""Options of param groups: checked by torch's own class, compared with what was sent, and as values that travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Options = dict[str, Any]


def check_group(twin: type[torch.optim.Optimizer], own: Mapping[str, Any]) -> None:
    """Let torch's class of the same name check a group's options.

    Raises:
        ValueError: torch's own.
    """
    twin([torch.zeros(1, 1)], **arguments(twin, own))


def check_parameters(
    twin: type[torch.optim.Optimizer], groups: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Let torch's class of the same name check the parameters of all groups; no memory is taken for that.

    Raises:
        ValueError: torch's own.
    """
    twin(
        [{**group, "params": [torch.empty_like(p, device="meta") for p in group["params"]]} for group in groups],
        **arguments(twin, defaults),
    )


def arguments(twin: type[torch.optim.Optimizer], own: Mapping[str, Any]) -> Options:
    """Return those of some options that the constructor of torch's class takes."""
    code = twin.__init__.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return {key: value for key, value in own.items() if key in names}


_NAMES: dict[str, tuple[str, ...]] = {}


def option_names(twin: Callable[..., torch.optim.Optimizer]) -> tuple[str, ...]:
    """Return the options of torch's class. After a load `defaults` has more: torch adds `differentiable` to all."""
    names = _NAMES.get(twin.__name__)
    if names is None:
        names = _NAMES[twin.__name__] = tuple(twin([torch.zeros(1, 1)]).defaults)
    return names


def plain_options(group: Mapping[str, Any], keys: Iterable[str]) -> Options:
    """Return those of a group's options as values that travel: a tensor as its number, a tuple as a list."""
    return {key: value if type(value := group[key]) in _PLAIN else _plain(value) for key in keys if key in group}


_PLAIN = frozenset({float, int, bool, str, type(None)})
"""Types of values that travel as they are."""


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value


def changes(now: Sequence[Options], sent: Sequence[Options]) -> dict[int, Options]:
    """Return the options of each group that the session does not have yet."""
    return {
        index: {key: value for key, value in here.items() if key not in there or there[key] != value}
        for index, (here, there) in enumerate(zip(now, sent, strict=True))
        if here != there
    }


def without(sent: Sequence[Options], unsure: Mapping[int, Options]) -> list[Options]:
    """Return what the session is known to have, when it is not known whether some changes arrived."""
    return [
        {key: value for key, value in options.items() if key not in unsure.get(index, {})}
        for index, options in enumerate(sent)
    ]
