"""Adagrad: a learning rate per element that falls with the squares of the gradients seen so far.

    g   ← −g if maximize;  g ← g + λp
    sum ← sum + g²
    p   ← p − lr / (1 + (t − 1)·lr_decay) · g / (√sum + ε)

t counts from 1; sum starts at `initial_accumulator_value` (both parts of a complex parameter do) and exists before the
first step. A sparse gradient changes the rows it names and no other.

Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 12
(2011); order of operations as in torch 2.13, `torch/optim/adagrad.py::_single_tensor_adagrad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import addcdiv, decayed, sign_of, signed
from farstep_service.optimizers.rule import ElementwiseRule, RowRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class AdagradHyper(CommonHyper):
    """Options of Adagrad, with torch's names and defaults."""

    rule: ClassVar[str] = "Adagrad"

    lr: float = 1e-2
    lr_decay: float = 0
    weight_decay: float = 0
    initial_accumulator_value: float = 0
    eps: float = 1e-10
    fused: bool | None = None

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid lr_decay value: {self.lr_decay}", self.lr_decay >= 0.0, field="lr_decay")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")
        in_range(
            f"Invalid initial_accumulator_value value: {self.initial_accumulator_value}",
            self.initial_accumulator_value >= 0.0,
            field="initial_accumulator_value",
        )
        in_range(f"Invalid epsilon value: {self.eps}", self.eps >= 0.0, field="eps")
        both = bool(self.fused and self.foreach)
        in_range("`fused` and `foreach` cannot be `True` together.", not both, field="fused")


@final
class Adagrad(ElementwiseRule[AdagradHyper], RowRule[AdagradHyper]):
    """The rule above."""

    name = "Adagrad"
    tensor_fields = ("sum",)
    hyper = AdagradHyper
    has_initial_state = True

    def initial(self, field: str, hyper: AdagradHyper) -> float:
        """Return `initial_accumulator_value`."""
        return hyper.initial_accumulator_value

    def scalars(self, counts: SegmentCounters, hyper: AdagradHyper) -> tuple[float, ...]:
        """Return the sign, weight decay, epsilon and the negative learning rate of this step."""
        rate = hyper.lr / (1 + counts.step * hyper.lr_decay)
        return (sign_of(hyper.maximize), hyper.weight_decay, hyper.eps, -rate)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, eps, minus_rate = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        total = torch.addcmul(state["sum"], g, g)
        return addcdiv(p, g, total.sqrt().add_(eps), minus_rate), {"sum": total}

    def check_sparse(self, hyper: AdagradHyper) -> None:
        """Refuse weight decay, which would have to touch every row."""
        if hyper.weight_decay != 0:
            raise TensorMismatch(
                "weight_decay option is not compatible with sparse gradients",
                field="weight_decay",
                remedy="Put the sparse parameter into a group with weight_decay=0.",
            )

    def update_rows(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[float]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula to the touched rows, with torch's own sparse operations so that the bits are torch's."""
        sign, _, eps, minus_rate = scalars
        g = signed(g, sign)
        index = torch.arange(g.shape[0], device=g.device).unsqueeze(0)

        def rows(values: Tensor) -> Tensor:
            # Not marked as coalesced, since torch adds coalesced ones with another rounding.
            return torch.sparse_coo_tensor(index, values, g.shape, device=values.device, check_invariants=False)

        total = state["sum"] + rows(g.pow(2))
        return torch.add(p, rows(g / (total.sqrt() + eps)), alpha=minus_rate), {"sum": total}
