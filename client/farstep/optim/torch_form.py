"""Parameters and state between torch's form and a session's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from farstep.errors import TensorMismatch
from farstep.fields import NUMBERS, FieldKind, shape_of
from farstep.link import Parameter
from farstep.optim.lists import lists_as_torch, lists_to_session
from farstep.optim.names import plain_names
from farstep.optim.options import arguments
from farstep.states import State

ON_DEVICE = frozenset({"eta", "mu"})
"""Numbers that torch keeps on the parameter's device; `step` is on the CPU."""


def describe(groups: Sequence[Mapping[str, Any]]) -> list[Parameter]:
    """Describe the parameters of all groups in order, by torch's `param_names` where the caller gave names.

    The names are those of the plain model: a compiled or wrapped one meets it in one session.

    Raises:
        TensorMismatch: a parameter is there twice, or its elements share memory; a step on it would mean nothing. Or it
            has no elements of its own, such as a DTensor.
    """
    described = []
    if len(every := [p for group in groups for p in group["params"]]) != len(set(every)):
        raise TensorMismatch(
            "A parameter is in a group more than once; torch warns that this will be an error.",
            remedy="Give each parameter once; the gradient of one that a module has under two names is in it whole.",
            side="client",
        )
    given = [name for group in groups for name in group.get("param_names") or ()]
    plain = dict(zip(given, plain_names(given), strict=True))
    for index, group in enumerate(groups):
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        for said, p in zip(names, group["params"], strict=True):
            name = plain.get(said, said)
            if is_traceable_wrapper_subclass(p):
                raise TensorMismatch(
                    f"Parameter {name!r} is a {type(p).__name__}, whose elements are other tensors'.",
                    remedy="Give whole parameters; a sync session takes the place of sharding them.",
                    field=name,
                    side="client",
                )
            if any(size > 1 and not stride for size, stride in zip(p.shape, p.stride(), strict=True)):
                raise TensorMismatch(
                    f"Elements of parameter {name!r} share memory, as those of an expanded tensor do.",
                    remedy="Give a clone() of it; torch refuses to step on it too.",
                    field=name,
                    side="client",
                )
            described.append(Parameter(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), index))
    return described


def to_session(p: Tensor, own: Mapping[str, Any], fields: Mapping[str, FieldKind]) -> State | None:
    """Return a parameter's state as the session takes it, dense, None where there is none.

    Raises:
        ValueError: a part of it is missing, or is no tensor.
    """
    present = {key: own[key] for key in fields if own.get(key) is not None}
    if not present:
        return None
    if "free" in fields.values():
        return lists_to_session(present)
    for key, kind in fields.items():
        if key not in present and kind != "optional" and shape_of(kind, p.shape) is not None:
            raise ValueError(f"loaded state dict has no {key!r} for a parameter; it is another optimizer's")
    if wrong := [key for key in present if fields[key] not in NUMBERS and not isinstance(present[key], Tensor)]:
        raise ValueError(f"loaded state dict has {wrong[0]!r} that is no tensor; it is another optimizer's")
    return {key: float(value) if fields[key] in NUMBERS else _dense(value) for key, value in present.items()}


def _dense(value: Tensor) -> Tensor:
    """Return a tensor as a session keeps it: torch's SGD has a sparse buffer after sparse gradients."""
    return value.to_dense() if value.is_sparse else value


def as_torch(
    p: Tensor, values: State, fields: Mapping[str, FieldKind], group: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return a parameter's state under torch's keys, numbers as the 0-dim tensors, or the ints, that torch has.

    Args:
        group: the options of the parameter's group, as far as they decide about torch's types.
    """
    if "free" in fields.values():
        return lists_as_torch(values, group.get("lr", 1.0))
    double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    dtype = torch.float64 if double else torch.float32

    def of_torch(key: str, value: Tensor | float) -> Tensor | int:
        if isinstance(value, Tensor):
            return value
        if fields[key] == "count":
            return int(value)
        return torch.tensor(value, dtype=dtype, device=p.device if key in ON_DEVICE else "cpu")

    return {key: of_torch(key, value) for key, value in values.items()}


def completed(twin: type[torch.optim.Optimizer], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `__setstate__` is given with what older forms of torch's class did not have, as torch adds it."""
    shell = twin.__new__(twin)
    torch_part = {key: state[key] for key in ("defaults", "state", "param_groups") if key in state}
    shell.__setstate__({"defaults": {}, **torch_part})
    return {**state, **{key: getattr(shell, key) for key in torch_part}}


def newborn(
    twin: type[torch.optim.Optimizer], defaults: Mapping[str, Any], p: Tensor, fields: Mapping[str, FieldKind]
) -> State | None:
    """Return what torch's class gives a parameter at its construction, None where state begins with a step."""
    fresh = twin([torch.empty_like(p)], **arguments(twin, defaults))
    return next((to_session(p, own, fields) for own in fresh.state.values()), None)


def _cloned(value: Any) -> Any:
    if isinstance(value, list):
        return [_cloned(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def local(
    twin: type[torch.optim.Optimizer],
    param_groups: Iterable[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    state: Mapping[Any, Any],
) -> torch.optim.Optimizer:
    """Return torch's optimizer over the parameters of some groups, with their options and a copy of the state."""
    groups = [dict(group) for group in param_groups]
    made = twin(groups, **arguments(twin, defaults))
    made.state.clear()
    for key, own in state.items():
        made.state[key] = {name: _cloned(value) for name, value in own.items()}
    for group in groups:
        for p in group["params"] if group.get("capturable") or group.get("fused") else ():
            own = made.state.get(p, {})
            own.update(
                {key: own[key].to(p.device) for key in ("step", "mu_product") if isinstance(own.get(key), Tensor)}
            )
    return made
