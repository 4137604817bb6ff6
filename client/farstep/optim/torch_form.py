"""Parameters and state in torch's form, and in that of a session.

State fields have the same names in both. L-BFGS, whose entries have shapes of their own, differs most:

    entry                        torch                              session
    func_evals, n_iter           int                                number
    prev_loss                    float                              number
    t, H_diag                    Python number or tensor            number or tensor []
    d, prev_flat_grad            tensor [n]                         the same
    old_dirs, old_stps, ro       list of k tensors                  one tensor [k, ...]
    al                           list of 0-dim tensors and None     one tensor, NaN for None
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.optim.options import arguments
from farstep.protocol.fields import NUMBERS, PRECISIONS, SINGLE, FieldKind, State, shape_of

COUNTERS = ("func_evals", "n_iter")
VECTORS = frozenset({"old_dirs", "old_stps"})
LISTS = VECTORS | {"ro", "al"}


def lists_to_session(own: Mapping[str, Any]) -> State:
    """Return a parameter's state as the session takes it.

    Raises:
        ValueError: a part of it is missing, or is no list of tensors of one shape.
    """
    for key in COUNTERS:
        if key not in own:
            raise ValueError(f"loaded state dict has no {key!r} for a parameter; it is another optimizer's")
    return {key: _to_session(key, value, own.get("d")) for key, value in own.items()}


def _to_session(key: str, value: Any, like: Any) -> Tensor | float:
    if key not in LISTS:
        return value if isinstance(value, Tensor) and key not in COUNTERS else float(value)
    vector = like if isinstance(like, Tensor) else torch.zeros(0, device="cpu")
    if not value:
        return vector.new_empty((0, len(vector)) if key in VECTORS else (0,))
    none = vector.new_full((), float("nan"))
    try:
        return torch.stack([none if each is None else each for each in value])
    except (RuntimeError, TypeError) as exc:
        raise ValueError(f"loaded state dict has {key!r} that is no list of tensors of one shape") from exc


def lists_as_torch(values: State, lr: Any) -> dict[str, Any]:
    """Return a parameter's state under torch's keys.

    Args:
        lr: the learning rate as the group has it, a Python number or a tensor; `t` is of the same kind.
    """
    found = {key: _as_torch(key, value) for key, value in values.items()}
    if isinstance(t := found.get("t"), float):
        found["t"] = _step_length(t, lr, first=found["n_iter"] <= 1)
    return found


def _step_length(t: float, lr: Any, *, first: bool) -> Any:
    """Return a step length, which no tensor operation computed, in torch's type.

    torch has the learning rate itself, or a multiple that its line search tried; in the first iteration a float times
    it; and the int 0 where a line search found nothing better than its start.
    """
    if t == 0 and float(lr) != 0:
        return 0
    if isinstance(lr, Tensor):
        return torch.full_like(lr, t, requires_grad=False)
    return int(t) if isinstance(lr, int) and not first and t.is_integer() else t


def _as_torch(key: str, value: Tensor | float) -> Any:
    if key in COUNTERS:
        return int(value)
    if not isinstance(value, Tensor):
        return int(value) if key == "H_diag" and float(value).is_integer() else float(value)
    if key not in LISTS:
        return value
    # Each in memory of its own: the alignment of a vector decides how its products are rounded.
    parts: Sequence[Tensor] = [each.clone() for each in value]
    return [None if bool(each.isnan()) else each for each in parts] if key == "al" else parts


ON_DEVICE = frozenset({"eta", "mu"})
"""Numbers that torch keeps on the parameter's device; `step` is on the CPU."""
DTYPES: Mapping[int, torch.dtype] = {bits: getattr(torch, name) for bits, name in PRECISIONS.items()}


def to_session(p: Tensor, own: Mapping[str, Any], fields: Mapping[str, FieldKind]) -> State | None:
    """Return a parameter's state as the session takes it, dense; None without state.

    Raises:
        ValueError: a part of it is missing, or is no tensor.
    """
    present = {key: own[key] for key in fields if own.get(key) is not None}
    if not present:
        return None
    if "free" in fields.values():
        return lists_to_session(present)
    for key, kind in fields.items():
        if key not in present and kind not in ("optional", "precision") and shape_of(kind, p.shape) is not None:
            raise ValueError(f"loaded state dict has no {key!r} for a parameter; it is another optimizer's")
    if wrong := [key for key in present if fields[key] not in NUMBERS and not isinstance(present[key], Tensor)]:
        raise ValueError(f"loaded state dict has {wrong[0]!r} that is no tensor; it is another optimizer's")
    state: State = {key: float(value) if fields[key] in NUMBERS else _dense(value) for key, value in present.items()}
    bits = _precision(value for key, value in present.items() if fields[key] == "number" and key != "step")
    return state | {key: float(bits) for key, kind in fields.items() if kind == "precision"}


def _precision(numbers: Iterable[Any]) -> int:
    """Return the significand bits of a state's numbers, of which torch's load gives all but `step` one dtype."""
    dtypes = [value.dtype for value in numbers if isinstance(value, Tensor)]
    return next((bits for bits, dtype in DTYPES.items() if dtypes[:1] == [dtype]), SINGLE)


def check_state_dtype(name: str, p: Tensor, own: State | None, fields: Mapping[str, FieldKind]) -> None:
    """Refuse state of another dtype than its parameter's, which has changed since.

    Raises:
        TensorMismatch: naming both.
    """
    for key, value in (own or {}).items():
        kind = fields[key]
        if kind == "free" or kind in NUMBERS or not isinstance(value, Tensor):
            continue
        if value.dtype != p.dtype:
            raise TensorMismatch(
                f"The state {key!r} of parameter {name!r} is {value.dtype}, the parameter is {p.dtype} by now; a "
                "session does not compute in both.",
                remedy="Give the parameter its dtype back before the step, or call load_state_dict(state_dict()), "
                "which casts the state as it does in torch.",
                field=name,
                side="client",
            )


def _dense(value: Tensor) -> Tensor:
    """Return a tensor as a session keeps it: torch's SGD has a sparse buffer after sparse gradients."""
    return value.to_dense() if value.is_sparse else value


def as_torch(
    p: Tensor, values: State, fields: Mapping[str, FieldKind], group: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return a parameter's state under torch's keys, numbers as the 0-dim tensors, or the ints, that torch has.

    Args:
        group: the options of the parameter's group that determine torch's types.
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
        own = dtype if key == "step" else of_numbers
        return torch.tensor(value, dtype=own, device=p.device if key in ON_DEVICE else "cpu")

    bits = next((values[key] for key, kind in fields.items() if kind == "precision"), None)
    of_numbers = dtype if bits is None else DTYPES[int(bits)]
    return {key: of_torch(key, value) for key, value in values.items() if fields[key] != "precision"}


def completed(torch_class: type[torch.optim.Optimizer], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument of `__setstate__`, completed by torch with what its older releases did not have."""
    shell = torch_class.__new__(torch_class)
    torch_part = {key: state[key] for key in ("defaults", "state", "param_groups") if key in state}
    shell.__setstate__({"defaults": {}, **torch_part})
    return {**state, **{key: getattr(shell, key) for key in torch_part}}


def initial_state(
    torch_class: type[torch.optim.Optimizer], defaults: Mapping[str, Any], p: Tensor, fields: Mapping[str, FieldKind]
) -> State | None:
    """Return the state that torch's class gives a parameter at construction, None where the first step creates it."""
    fresh = torch_class([torch.empty_like(p)], **arguments(torch_class, defaults))
    return next((to_session(p, own, fields) for own in fresh.state.values()), None)


def torch_initial_states(
    torch_class: type[torch.optim.Optimizer], defaults: Mapping[str, Any], parameters: Iterable[Tensor]
) -> dict[Tensor, Any]:
    """Return the state that torch's class creates at its construction, and keeps for parameters that never step."""
    return dict(torch_class(list(parameters), **arguments(torch_class, defaults)).state)


def _clone(value: Any) -> Any:
    if isinstance(value, list):
        return [_clone(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def local(
    torch_class: type[torch.optim.Optimizer],
    param_groups: Iterable[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    state: Mapping[Any, Any],
) -> torch.optim.Optimizer:
    """Return torch's optimizer over the parameters of some groups, with their options and a copy of the state."""
    groups = [dict(group) for group in param_groups]
    made = torch_class(groups, **arguments(torch_class, defaults))
    made.state.clear()
    for key, own in state.items():
        made.state[key] = {name: _clone(value) for name, value in own.items()}
    for group in groups:
        for p in group["params"] if group.get("capturable") or group.get("fused") else ():
            own = made.state.get(p, {})
            own.update(
                {key: own[key].to(p.device) for key in ("step", "mu_product") if isinstance(own.get(key), Tensor)}
            )
    return made
