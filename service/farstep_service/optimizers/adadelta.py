"""Adadelta: steps whose size follows the size of the last steps, in the units of the parameter.

    g          ← −g if maximize;  g ← g + λp
    square_avg ← ρ·square_avg + (1 − ρ)·g²
    Δ          ← √(acc_delta + ε) / √(square_avg + ε) · g
    acc_delta  ← ρ·acc_delta + (1 − ρ)·Δ²
    p          ← p − lr·Δ

Both averages start at 0. The step is counted and not used.

Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701 (2012); order of operations as in torch
2.13, `torch/optim/adadelta.py::_single_tensor_adadelta`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import add, addcmul_, decayed, sign_of, signed
from farstep_service.optimizers.rule import ElementwiseRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class AdadeltaHyper(CommonHyper):
    """Options of Adadelta, with torch's names and defaults."""

    rule: ClassVar[str] = "Adadelta"

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0
    capturable: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid rho value: {self.rho}", 0.0 <= self.rho <= 1.0, field="rho")
        in_range(f"Invalid epsilon value: {self.eps}", self.eps >= 0.0, field="eps")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")


@final
class Adadelta(ElementwiseRule[AdadeltaHyper]):
    """The rule above."""

    name = "Adadelta"
    tensor_fields = ("square_avg", "acc_delta")
    hyper = AdadeltaHyper

    def scalars(self, counts: SegmentCounters, hyper: AdadeltaHyper) -> tuple[float, ...]:
        """Return the sign, weight decay, ρ, 1 − ρ, epsilon and the negative learning rate."""
        return (sign_of(hyper.maximize), hyper.weight_decay, hyper.rho, 1 - hyper.rho, hyper.eps, -hyper.lr)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, rho, rest, eps, minus_lr = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        square_avg = addcmul_(state["square_avg"] * rho, g, g, rest)
        acc_delta = state["acc_delta"]
        delta = (acc_delta + eps).sqrt_().div_((square_avg + eps).sqrt_()).mul_(g)
        acc_delta = addcmul_(acc_delta * rho, delta, delta, rest)
        return add(p, delta, minus_lr), {"square_avg": square_avg, "acc_delta": acc_delta}
