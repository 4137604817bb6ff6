"""torch's own words for what an optimizer does not take: its class is asked, on tensors of one element.

Gradients: a session refuses them too, as a server has to; who catches torch's exceptions gets torch's, the session's
as its cause.

Options: torch's classes pass them on to operations that take numbers of some types and not of others, another choice in
each class: a `Fraction` is a learning rate for Adam and not for SGD, an array of one number is an `lr` and not an
`eps`. Which ones only a step shows, so one of the options is tried at a time, once for each type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from farstep.optim.options import arguments, option_kinds, plain_options, unusual


def refusal(
    twin: type[torch.optim.Optimizer], defaults: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]
) -> RuntimeError | None:
    """Return what torch's class raises for gradients like those of these groups, None where it takes them all."""
    for group in groups:
        probes = {_kind(p): p for p in group["params"] if p.grad is not None}
        for p in probes.values():
            asked = twin([_probe(p)], **arguments(twin, defaults))
            asked.param_groups[0].update({key: group[key] for key in defaults if key in group})
            try:
                asked.step()
            except RuntimeError as error:
                return error
            except TypeError:
                return None  # an option that is no number, which the session says better
    return None


def _kind(p: Tensor) -> tuple[object, ...]:
    return p.dtype, p.dim(), p.grad is not None and (p.grad.layout, p.grad.dtype)


def _probe(p: Tensor) -> Tensor:
    """Return a parameter of one element with a gradient such as this one has."""
    probe = torch.zeros([1] * p.dim(), dtype=p.dtype, device="cpu")
    probe.requires_grad_(probe.is_floating_point() or probe.is_complex())
    gradient = torch.ones_like(probe, requires_grad=False)
    if p.grad is not None and p.grad.is_sparse:
        gradient = gradient.to_sparse(p.grad.sparse_dim())
    if p.grad is not None and p.grad.dtype is not p.dtype:
        gradient = gradient.to(p.grad.dtype)
        probe.data = probe.data.to(p.grad.dtype)  # torch takes a gradient only of the dtype that there is
        probe.grad = gradient
        probe.data = probe.data.to(p.dtype)
        return probe
    probe.grad = gradient
    return probe


STEPS: Final = 8
"""How many steps show it: SGD multiplies by its momentum in the second, RAdam uses `eps` from the sixth on."""
_TAKEN: dict[tuple[object, ...], Exception | None] = {}
"""What torch's classes said to options of some types."""


def check_types(twin: type[torch.optim.Optimizer], groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse options of types that torch's class does not take, before they become numbers that a session takes.

    Raises:
        TypeError, ValueError, RuntimeError: as torch's class does, naming the option.
    """
    kinds = option_kinds(twin)
    for group in groups:
        if not (names := unusual(group, kinds)):
            continue
        p = next((p for p in group["params"] if p.grad is not None), None)
        if p is None:
            continue
        plain = plain_options(group, {key: kind for key, kind in kinds.items() if key in group and key not in names})
        used = tuple(map(bool, plain.values()))
        for name in names:
            key = (twin, name, _type_of(group[name]), used, *_kind(p))
            if key not in _TAKEN:
                _TAKEN[key] = _said(twin, plain, name, group[name], p)
            if (said := _TAKEN[key]) is not None:
                raise _as(said)(
                    f"torch.optim.{twin.__name__} does not take {name}={group[name]!r:.80}, which is a "
                    f"{type(group[name]).__name__}: {said!s:.200}"
                ) from said


def _as(error: Exception) -> type[Exception]:
    """Return the class of Python's own that an error is of."""
    return next(each for each in (TypeError, ValueError, RuntimeError) if isinstance(error, each))


def _type_of(value: Any) -> tuple[object, ...]:
    """Return what decides whether an operation takes a value: its type, and whether there is anything to do."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (type(value), *map(_type_of, value))
    form = (getattr(value, "dtype", None), getattr(value, "shape", None))
    return type(value), *form, bool(value) if form[1] in (None, ()) else None


def _said(
    twin: type[torch.optim.Optimizer], plain: Mapping[str, Any], name: str, value: Any, p: Tensor
) -> Exception | None:
    """Return what torch's class raises for one option beside plain ones, None where it takes it."""
    probe = _probe(p)
    try:
        asked = twin([probe], **arguments(twin, {}))
        asked.param_groups[0].update({**plain, "foreach": False, "fused": False, "capturable": False, name: value})
        for _ in range(STEPS):
            _step(asked, probe)
    except (TypeError, ValueError, RuntimeError) as error:
        return error.with_traceback(None)
    except ArithmeticError:
        return None  # for the value, not its type
    return None


def _step(optimizer: torch.optim.Optimizer, probe: Tensor) -> None:
    loss = probe.sum().abs() + 1  # which LBFGS takes for its objective
    optimizer.step(lambda: loss)  # type: ignore[arg-type, return-value]  # as LBFGS has it
