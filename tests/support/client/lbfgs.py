"""farstep.optim.LBFGS beside torch.optim.LBFGS: how both are made, and compared to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import farstep
from tests.support.client.twins import check_equal
from tests.support.optimizers.objectives import (
    Objective,
)

STEPS = 20
WOLFE: dict[str, Any] = {"line_search_fn": "strong_wolfe"}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "history_size": 3, "max_iter": 6},
    WOLFE,
    {**WOLFE, "lr": 0.3, "history_size": 2, "max_iter": 9, "max_eval": 7},
    {**WOLFE, "tolerance_grad": 1e-2, "tolerance_change": 1e-4},
    {"max_iter": 1, "max_eval": 1},
    {"lr": torch.tensor(0.3), "max_iter": 5},
    {**WOLFE, "lr": torch.tensor(0.3), "max_iter": 5},
]

Make = Callable[[torch.dtype], Objective]


def ours(objective: Objective, **options: Any) -> farstep.optim.LBFGS:
    return farstep.optim.LBFGS(objective.parameters, **options)


def theirs(objective: Objective, **options: Any) -> Any:
    return torch.optim.LBFGS(objective.parameters, **options)


def check(here: Objective, there: Objective, mine: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare parameters, evaluations and state_dicts."""
    assert here.evaluations == there.evaluations
    check_equal([p.detach() for p in here.parameters], [p.detach() for p in there.parameters])
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for index, own in other["state"].items():
        assert mine["state"][index].keys() == own.keys()
        for key, value in own.items():
            check_entry(mine["state"][index][key], value)


def check_entry(here: Any, there: Any) -> None:
    """Compare an entry of a state: its kind and its bits."""
    if isinstance(there, list):
        assert type(here) is list
        assert len(here) == len(there)
        for mine, other in zip(here, there, strict=True):
            check_entry(mine, other)
    elif isinstance(there, Tensor):
        check_equal([here], [there])
    else:
        assert type(here) is type(there)
        assert here == there or (here != here and there != there)


def check_state(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Compare the state of two state_dicts."""
    assert here["state"].keys() == there["state"].keys()
    for index, own in there["state"].items():
        for key, value in own.items():
            check_entry(here["state"][index][key], value)


def copied(objective: Objective, make: Make) -> Objective:
    """Return the same objective at the same parameters."""
    other = make(objective.parameters[0].dtype)
    with torch.no_grad():
        for p, q in zip(other.parameters, objective.parameters, strict=True):
            p.copy_(q)
    return other
