"""Adamax: Adam with the infinity norm in place of the second moment.

    g       ← −g if maximize;  g ← g + λp
    exp_avg ← exp_avg + (1 − β₁)·(g − exp_avg)
    exp_inf ← max(β₂·exp_inf, |g| + ε)
    p       ← p − lr / (1 − β₁ᵗ) · exp_avg / exp_inf

t counts from 1; both states start at 0.

Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980 (2014), section 7.1; order of
operations as in torch 2.13, `torch/optim/adamax.py::_single_tensor_adamax` without `capturable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import addcdiv, decayed, lerp, sign_of, signed
from farstep_service.optimizers.rule import ElementwiseRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class AdamaxHyper(CommonHyper):
    """Options of Adamax, with torch's names and defaults."""

    rule: ClassVar[str] = "Adamax"

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0
    capturable: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid epsilon value: {self.eps}", self.eps >= 0.0, field="eps")
        for index, beta in enumerate(self.betas):
            in_range(f"Invalid beta parameter at index {index}: {beta}", 0.0 <= beta < 1.0, field="betas")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")


@final
class Adamax(ElementwiseRule[AdamaxHyper]):
    """The rule above."""

    name = "Adamax"
    tensor_fields = ("exp_avg", "exp_inf")
    hyper = AdamaxHyper

    def scalars(self, counts: SegmentCounters, hyper: AdamaxHyper) -> tuple[float, ...]:
        """Return the sign, weight decay, 1 − β₁, β₂, epsilon and the negative learning rate over 1 − β₁ᵗ."""
        beta1, beta2 = hyper.betas
        rate = hyper.lr / (1 - beta1 ** (counts.step + 1))
        return (sign_of(hyper.maximize), hyper.weight_decay, 1 - beta1, beta2, hyper.eps, -rate)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, rest, beta2, eps, minus_rate = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        exp_avg = lerp(state["exp_avg"], g, rest)
        exp_inf = torch.maximum(state["exp_inf"] * beta2, g.abs().add_(eps))
        return addcdiv(p, exp_avg, exp_inf, minus_rate), {"exp_avg": exp_avg, "exp_inf": exp_inf}
