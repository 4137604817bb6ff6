"""Gradients of another dtype than their parameter's, which torch allows by `p.grad_dtype` or `p.data`.

    an optimizer whose first operation on a gradient    widened before the step, to the same bits: each number of the
    promotes it to the parameter's dtype                gradient is one of the parameter's dtype, too
    any other                                           refused, in torch's words where torch fails on it

The others compute in both dtypes or in the gradient's: SGD's first momentum buffer is a clone of the gradient, and
Rprop's `step_size` and the state of Adafactor and Muon have its dtype. A session has state in the parameter's dtype. A
gradient that is wider than its parameter, or neither (float16 and bfloat16), would be rounded elsewhere than in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.link import Parameter

Options = Mapping[str, Any]


def _always(_: Options) -> bool:
    return True


def _decays(options: Options) -> bool:
    """Return whether the parameter is added to the gradient, which promotes it."""
    return bool(options["weight_decay"]) and not options.get("decoupled_weight_decay", False)


PROMOTES: Final[Mapping[str, Callable[[Options], bool]]] = {
    "SGD": lambda options: not options["momentum"] or _decays(options),
    "RMSprop": lambda options: not options["centered"] or _decays(options),
    "Adagrad": _always,
    "Adadelta": _always,
    "ASGD": _always,
    "Adam": _decays,
    "NAdam": _decays,
    "RAdam": _decays,
    "Adamax": _decays,
}
"""By optimizer: whether a group's options promote a gradient before anything else is done to it."""


def of_their_parameters(
    optimizer: str,
    described: Sequence[Parameter],
    dtypes: Sequence[torch.dtype],
    options: Sequence[Options],
    gradients: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """Return gradients in the dtypes of their parameters, unchanged where they have them.

    Args:
        optimizer: torch's class name.
        described, dtypes, gradients: one for each parameter.
        options: of each group.

    Raises:
        TensorMismatch: torch's step along a gradient would have other bits than one along the widened gradient.
    """
    for each, dtype in zip(gradients, dtypes, strict=True):
        if each is not None and each.dtype is not dtype:
            break
    else:
        return gradients
    found: list[Tensor | None] = []
    for gradient, dtype, parameter in zip(gradients, dtypes, described, strict=True):
        if gradient is not None and gradient.dtype is not dtype:
            promotes = PROMOTES.get(optimizer)
            exact = gradient.layout is torch.strided and _holds(dtype, gradient.dtype)
            if not exact or promotes is None or not promotes(options[parameter.group]):
                raise TensorMismatch(
                    f"The gradient of parameter {parameter.name!r} is {gradient.dtype}, the parameter {dtype}. torch's "
                    f"{optimizer} would compute in both with these options, a session computes in the parameter's.",
                    remedy="Cast the gradient before the step: p.grad = p.grad.to(p.dtype).",
                    field=parameter.name,
                    side="client",
                )
            gradient = gradient.to(dtype)
        found.append(gradient)
    return found


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether each number of a dtype is a number of the wider one, of the same kind."""
    alike = wide.is_complex == narrow.is_complex and wide.is_floating_point == narrow.is_floating_point
    return alike and torch.promote_types(wide, narrow) is wide
