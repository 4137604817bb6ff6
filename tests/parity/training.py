"""Train one case on one side, and read everything that is left: parameters, state, groups, and what steps returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import farstep
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.parity.cases import Case
from tests.parity.comparison import Outcome, Refusal


def ours(case: Case, dtype: torch.dtype, steps: int, place: RemoteOptions) -> Outcome | Refusal:
    """Train a case with farstep's class, at a place."""
    kind: Callable[..., RemoteOptimizer] = vars(farstep.optim)[case.name]
    opened: list[RemoteOptimizer] = []

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        opened.append(kind(groups, **_options(case), **place))
        return opened[0]

    try:
        return _train(case, dtype, steps, make)
    finally:
        for optimizer in opened:
            optimizer.close()


def theirs(case: Case, dtype: torch.dtype, steps: int) -> Outcome | Refusal:
    """Train a case with torch's class."""
    kind: Callable[..., torch.optim.Optimizer] = vars(torch.optim)[case.name]
    outcome = _train(case, dtype, steps, lambda groups: kind(groups, **{**_options(case), **case.instead}))
    if isinstance(outcome, Refusal):
        return outcome
    # Ours has the options of the case in its groups, whatever torch has to run instead.
    return {
        path: case.options[option] if (option := path.rpartition(".")[2]) in case.instead else each
        for path, each in outcome.items()
    }


def _options(case: Case) -> dict[str, Any]:
    """Return the options of a case, with the for-loop as torch's implementation where there is a choice."""
    loop = {"foreach": False} if "foreach" in inspect.signature(vars(torch.optim)[case.name]).parameters else {}
    return {**loop, **case.options}


def _train(
    case: Case, dtype: torch.dtype, steps: int, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> Outcome | Refusal:
    step, ps, returned = 0, case.way.parameters(dtype), []
    try:
        optimizer = make(case.way.groups(ps))
        for step in range(1, steps + 1):
            returned.append(case.way.step(optimizer, ps, step))
    except Exception as exc:
        return Refusal(step, exc)
    left = optimizer.state_dict()
    return dict(_flat("", {"parameters": [p.detach() for p in ps], "returned": returned, **left}))


def _flat(path: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield f"{path}()", sorted(map(str, value))
        for key, each in value.items():
            yield from _flat(f"{path}.{key}", each)
    elif isinstance(value, list | tuple):
        yield f"{path}()", (type(value), len(value))
        for index, each in enumerate(value):
            yield from _flat(f"{path}.{index}", each)
    else:
        yield path, value.detach() if isinstance(value, Tensor) else value
