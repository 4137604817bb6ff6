"""SparseAdam: Adam on the rows that a sparse gradient names, the others resting.

    g   ← −g if maximize
    m   ← m + (1 − β₁)·(g − m);  v ← v + (1 − β₂)·(g² − v)
    p   ← p − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε)

t counts from 1, for a parameter and not for its rows; a gradient without rows counts, too. Dense gradients are refused.

Source: `torch/optim/_functional.py::sparse_adam` of torch 2.13, also for the order of operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.hyper import Hyper, in_range
from farstep_service.layout import Layout
from farstep_service.optimizers.arithmetic import add, add_, sign_of, signed
from farstep_service.optimizers.rule import ElementwiseRule, RowRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class SparseAdamHyper(Hyper):
    """Options of SparseAdam, with torch's names and defaults."""

    rule: ClassVar[str] = "SparseAdam"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    maximize: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr > 0.0, field="lr")
        in_range(f"Invalid epsilon value: {self.eps}", self.eps > 0.0, field="eps")
        for index, beta in enumerate(self.betas):
            in_range(f"Invalid beta parameter at index {index}: {beta}", 0.0 <= beta < 1.0, field="betas")


@final
class SparseAdam(ElementwiseRule[SparseAdamHyper], RowRule[SparseAdamHyper]):
    """The rule above."""

    name = "SparseAdam"
    tensor_fields = ("exp_avg", "exp_avg_sq")
    special = MappingProxyType({"step": "count"})
    kernels = ("reference",)
    hyper = SparseAdamHyper

    def scalars(self, counts: SegmentCounters, hyper: SparseAdamHyper) -> tuple[float, ...]:
        """Return the sign, the weights of g in both averages, epsilon and the negative learning rate of this step."""
        step = counts.step + 1
        beta1, beta2 = hyper.betas
        if beta2**step > 1:
            raise ArithmeticError(f"{1 - beta2**step} has no real root")
        rate = hyper.lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return (sign_of(hyper.maximize), 1 - beta1, 1 - beta2, hyper.eps, -rate)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, rest1, rest2, eps, minus_rate = scalars
        g = signed(g, sign)
        first = add_(g.sub(state["exp_avg"]).mul_(rest1), state["exp_avg"], 1)
        second = add_(g.pow(2).sub_(state["exp_avg_sq"]).mul_(rest2), state["exp_avg_sq"], 1)
        numerator = first.div(second.sqrt().add_(eps))
        return add(p, numerator.mul_(minus_rate), 1), {"exp_avg": first, "exp_avg_sq": second}

    def update_rows(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[float]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula to the touched rows."""
        return self.update(p, g, state, scalars)

    def check_layout(self, layout: Layout) -> None:
        """Refuse complex parameters, which torch names by the numbers of their groups and their places in them."""
        places: dict[int, int] = {}
        found = []
        for segment in layout.segments:
            place = places[segment.group] = places.get(segment.group, -1) + 1
            if segment.is_complex:
                found.append([segment.group, place])
        if found:
            raise TensorMismatch(
                f"Complex params at indices {found}: SparseAdam does not support complex parameters",
                remedy="Give complex parameters to another optimizer.",
            )

    def check_gradients(
        self, layout: Layout, groups: Sequence[SparseAdamHyper], dense: Iterable[int], sparse: Iterable[int]
    ) -> None:
        """Refuse dense gradients."""
        if (index := next(iter(dense), None)) is not None:
            raise TensorMismatch(
                "SparseAdam does not support dense gradients, please consider Adam instead",
                field=layout.segments[index].name,
            )
