"""The state of L-BFGS between torch's form and a session's, where each entry has a shape of its own.

entry                               torch                                 session
func_evals, n_iter                  int                                   number
prev_loss                           float                                 number
t, H_diag                           Python number or tensor               number or tensor []
d, prev_flat_grad                   tensor [n]                            the same
old_dirs, old_stps, ro              list of k tensors                     one tensor [k, ...]
al                                  list of 0-dim tensors and None        one tensor, NaN for None
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from farstep.states import State

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
        lr: the learning rate as the group has it: a Python number or a tensor, of whose kind `t` is.
    """
    found = {key: _as_torch(key, value) for key, value in values.items()}
    if isinstance(t := found.get("t"), float):
        found["t"] = _step_length(t, lr, first=found["n_iter"] <= 1)
    return found


def _step_length(t: float, lr: Any, *, first: bool) -> Any:
    """Return a step length that is no result of tensors in torch's type.

    torch has the learning rate itself, or a multiple that its line search has tried; in the first iteration a float
    times it; and the int 0 where a line search found nothing better than its beginning.
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
    # Each in memory of its own: where a vector begins decides how its products are rounded.
    parts: Sequence[Tensor] = [each.clone() for each in value]
    return [None if bool(each.isnan()) else each for each in parts] if key == "al" else parts
