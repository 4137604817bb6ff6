"""Trainings that can be cut in two: the same objective at the same step, whoever takes it, wherever it goes on.

One row for each optimizer. Its options are none of the defaults; `switched` are options that change at step 3, and
every step has a learning rate of its own, as with a scheduler. One parameter gets its first gradient after the cut,
another one every second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farstep.settings import RemoteOptions
from tests.support.client.twins import Group, drawn, ours, parameters, plain, some_rows, theirs

CUT, END = 5, 10
"""Steps before the training is interrupted, and in all."""
SWITCH_AT = 3
LATE, EVEN = 1, 2
"""The parameter whose first gradient comes after the cut, and the one that gets one at even steps only."""

Parameters = Sequence[tuple[tuple[int, ...], torch.dtype]]
EXACT: Parameters = (
    ((4, 3), torch.float32),
    ((5,), torch.float64),
    ((), torch.float32),
    ((0, 3), torch.float32),
    ((7,), torch.float32),
)
EVERY: Parameters = (
    *EXACT,
    ((2, 3), torch.bfloat16),
    ((3,), torch.complex64),
    ((6,), torch.float16),
    ((2, 2), torch.complex128),
)
REAL: Parameters = (*EXACT[:3], *EXACT[4:], *((shape, dtype) for shape, dtype in EVERY[5:] if not dtype.is_complex))
"""What Adafactor takes: no complex numbers, and, as torch divides by it, some elements."""
MATRICES: Parameters = (
    ((4, 3), torch.float32),
    ((5, 2), torch.float64),
    ((1, 1), torch.float32),
    ((0, 3), torch.float32),
    ((9, 13), torch.float32),
    ((2, 3), torch.bfloat16),
)
ROWS: Parameters = (
    ((4, 3), torch.float32),
    ((5,), torch.float64),
    ((6, 2), torch.float32),
    ((0, 3), torch.float32),
    ((7, 2, 2), torch.float32),
    ((6,), torch.bfloat16),
)
ALIKE: Parameters = tuple((shape, torch.float32) for shape, _ in EXACT)


@dataclass(frozen=True)
class Case:
    """How an optimizer is tried.

    Attributes:
        options: torch's own.
        switched: options that change at step 3.
        torch_switches: whether torch's class can take that change; some state it makes at the first step or never.
        has_state: whether a training without its state is another one.
        rounds: whether torch's `load_state_dict` rounds a number of the state to the parameter's dtype, as it does
            with `mu_product` and `eta`, so that with 16-bit parameters not even torch resumes exactly.
        parameters: the parameters it takes.
        sparse: whether it takes sparse gradients only.
        groups: how many param groups it has.
    """

    options: dict[str, Any]
    switched: dict[str, Any] = field(default_factory=dict)
    torch_switches: bool = True
    has_state: bool = True
    rounds: bool = False
    parameters: Parameters = EVERY
    sparse: bool = False
    groups: int = 2

    def exact(self) -> Parameters:
        """Return those of the parameters that torch and the reference kernels update alike, bit by bit."""
        return [each for each in self.parameters if each[1] in (torch.float32, torch.float64)]


CASES: dict[str, Case] = {
    "Adagrad": Case({"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.02, "initial_accumulator_value": 0.3, "eps": 1e-4}),
    "Adadelta": Case({"lr": 0.5, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.02}, {"rho": 0.8}),
    "Adamax": Case({"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.02}, {"betas": (0.6, 0.9)}),
    "ASGD": Case(
        {"lr": 0.1, "lambd": 0.02, "alpha": 0.6, "t0": 4, "weight_decay": 0.02}, {"maximize": True}, rounds=True
    ),
    "SGD": Case({"lr": 0.1, "dampening": 0.2, "weight_decay": 0.02}, {"momentum": 0.9}),
    "Adam": Case({"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.02}, {"amsgrad": True}, False),
    "AdamW": Case({"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "maximize": True}, {"amsgrad": True}, False),
    "NAdam": Case(
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "momentum_decay": 0.1}, {"weight_decay": 0.1}, rounds=True
    ),
    "RAdam": Case({"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "decoupled_weight_decay": True}, {"weight_decay": 0.1}),
    "RMSprop": Case({"lr": 0.1, "alpha": 0.7, "eps": 1e-2, "centered": True}, {"momentum": 0.5}, False),
    "Rprop": Case({"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.2)}, {"maximize": True}),
    "Adafactor": Case(
        {"lr": 0.1, "beta2_decay": -0.5, "eps": (1e-4, 1e-2), "weight_decay": 0.1}, {"maximize": True}, parameters=REAL
    ),
    "Muon": Case(
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.02, "ns_steps": 3}, {"nesterov": False}, parameters=MATRICES
    ),
    "SparseAdam": Case({"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}, {"maximize": True}, parameters=ROWS, sparse=True),
    "LBFGS": Case(
        {"lr": 0.3, "max_iter": 3, "history_size": 4, "tolerance_change": 0.0},
        {"line_search_fn": "strong_wolfe"},
        parameters=ALIKE,
        groups=1,
    ),
}
"""One row for each class of `farstep.optim`; `test_resume.py` says so."""
STATELESS = "SGD"
"""Without momentum it has no state."""
CASES_AND_PLAIN: dict[str, Case] = {
    **CASES,
    "SGD without momentum": Case({"lr": 0.1, "weight_decay": 0.02}, has_state=False),
}


def grouped(ps: list[Tensor], groups: int) -> list[Group]:
    """Put the parameters into one group, or into two of which the second has a learning rate of its own."""
    return [{"params": ps}] if groups == 1 else [{"params": ps[:3]}, {"params": ps[3:], "lr": 0.05}]


class Training:
    """An optimizer and its parameters, at some step of the training.

    Args:
        name: a row of the table.
        place: farstep's own options; None for torch's optimizer.
        start: the values of the parameters.
        switches: whether the options of the row are switched.
    """

    def __init__(
        self, name: str, place: RemoteOptions | None, start: Sequence[Tensor], *, switches: bool = True
    ) -> None:
        self.case = CASES_AND_PLAIN[name]
        self.parameters = parameters(start)
        self._switched = self.case.switched if switches else {}
        groups, kind = grouped(self.parameters, self.case.groups), name.split(" ")[0]
        options = plain(kind, self.case.options)
        self.optimizer: Any = (
            theirs(kind)(groups, **options) if place is None else ours(kind)(groups, **options, **place)
        )

    def train(self, first: int, last: int) -> None:
        """Take the steps from `first` to before `last`."""
        for step in range(first, last):
            for number, group in enumerate(self.optimizer.param_groups):
                group["lr"] = self.case.options["lr"] * (1 + number) / (1 + 0.1 * step)
                if step >= SWITCH_AT:
                    group.update(self._switched)
            self.optimizer.step(self.closure(step))

    def closure(self, step: int) -> Callable[[], Tensor]:
        """Return a step's objective: its gradient depends on the parameters and on drawn numbers."""
        shapes = [p.shape for p in self.parameters]
        drawn_ones = [each.to(p.dtype) for each, p in zip(drawn(step, shapes), self.parameters, strict=True)]

        def closure() -> Tensor:
            loss = torch.zeros(())
            for index, (p, numbers) in enumerate(zip(self.parameters, drawn_ones, strict=True)):
                p.grad = None
                if not (index == LATE and step < CUT) and not (index == EVEN and step % 2):
                    gradient = numbers + 0.1 * p.detach()
                    p.grad = some_rows(gradient, step) if self.case.sparse else gradient
                    loss += (p.detach() * (numbers + 0.05 * p.detach()).conj()).real.sum().float()
            return loss

        return closure

    def result(self) -> dict[str, Any]:
        """Return parameters and state as they are now: what two equal trainings have in common."""
        state = self.optimizer.state_dict()["state"]
        return {"parameters": [p.detach().clone() for p in self.parameters], "state": state}


def begin(which: Parameters) -> list[Tensor]:
    """Return the values that every training begins with."""
    return [drawn(100 + index, [shape])[0].to(dtype) for index, (shape, dtype) in enumerate(which)]


def same_bits(here: Any, there: Any) -> bool:
    """Return whether two results are equal, bit for bit, NaN included."""
    if isinstance(there, dict):
        return here.keys() == there.keys() and all(same_bits(here[key], value) for key, value in there.items())
    if isinstance(there, list):
        return len(here) == len(there) and all(map(same_bits, here, there))
    if isinstance(there, Tensor):
        return (here.dtype, here.shape, here.device) == (there.dtype, there.shape, there.device) and torch.equal(
            _bytes_of(here), _bytes_of(there)
        )
    return bool(here == there)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
