"""`farstep.remote`: move a running torch optimizer into a session. `RemoteOptimizer.to_local` is the way home."""

from __future__ import annotations

from typing import Unpack

import torch

import farstep.optim
from farstep.errors import invalid_option
from farstep.optim.base import RemoteOptimizer
from farstep.optim.options import arguments
from farstep.settings import RemoteOptions


def remote(optimizer: torch.optim.Optimizer, **options: Unpack[RemoteOptions]) -> RemoteOptimizer:
    """Return farstep's optimizer of the same name over the same parameters, with groups, options and state.

    It continues as the torch optimizer would; an existing session keeps its own parameters and state. Hooks are not
    copied, as when torch copies an optimizer, and a scheduler has to be made anew; its entries in the groups, such as
    `initial_lr`, are copied. The torch optimizer is not changed.

    Args:
        optimizer: an optimizer of `torch.optim`.
        options: farstep's own, such as `server`.

    Raises:
        InvalidOption: farstep has no optimizer of that class, or the optimizer is differentiable.
        ValueError: a group's options, or a part of the state, are not such an optimizer's.
        FarstepError: the session cannot be joined.
    """
    kinds = {kind.torch_class: kind for kind in _kinds()}
    kind = kinds.get(type(optimizer))
    if kind is None:
        raise invalid_option(
            f"farstep has no remote form of {type(optimizer).__module__}.{type(optimizer).__name__}.",
            remedy=f"It has those of torch.optim's {', '.join(sorted(each.__name__ for each in kinds))}.",
            field="optimizer",
        )
    own = arguments(kind.torch_class, optimizer.defaults)
    if any(group.get("differentiable") for group in optimizer.param_groups):
        own["differentiable"] = True
    moved = kind.__new__(kind)
    groups = [dict(group) for group in optimizer.param_groups]
    RemoteOptimizer.__init__(moved, groups, own, options, optimizer.state)
    return moved


def _kinds() -> list[type[RemoteOptimizer]]:
    named = [getattr(farstep.optim, name) for name in farstep.optim.__all__]
    return [each for each in named if "torch_class" in vars(each)]
