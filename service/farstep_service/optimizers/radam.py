"""RAdam: Adam that begins as plain momentum, until its average of squares can be trusted.

    g          ← −g if maximize;  g ← g + λp, or p ← (1 − lr·λ)·p if the decay is decoupled
    exp_avg    ← exp_avg + (1 − β₁)·(g − exp_avg)
    exp_avg_sq ← β₂·exp_avg_sq + (1 − β₂)·g²
    m          = exp_avg / (1 − β₁ᵗ)
    ρ∞ = 2 / (1 − β₂) − 1,  ρₜ = ρ∞ − 2·t·β₂ᵗ / (1 − β₂ᵗ),  r² = (ρₜ − 4)(ρₜ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρₜ)
    p          ← p − lr·m·r·√(1 − β₂ᵗ) / (√exp_avg_sq + ε) if ρₜ > 5, else p − lr·m

t counts from 1; both states start at 0.

Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265 (2019); order of
operations as in torch 2.13, `torch/optim/radam.py::_single_tensor_radam` without `capturable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import (
    add,
    addcmul_,
    decay_of,
    decayed,
    divided,
    lerp,
    root,
    shrunk,
    sign_of,
    signed,
)
from farstep_service.optimizers.rule import ElementwiseRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class RAdamHyper(CommonHyper):
    """Options of RAdam, with torch's names and defaults."""

    rule: ClassVar[str] = "RAdam"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0
    decoupled_weight_decay: bool = False
    capturable: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid epsilon value: {self.eps}", self.eps >= 0.0, field="eps")
        for index, beta in enumerate(self.betas):
            in_range(f"Invalid beta parameter at index {index}: {beta}", 0.0 <= beta < 1.0, field="betas")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")


@final
class RAdam(ElementwiseRule[RAdamHyper]):
    """The rule above."""

    name = "RAdam"
    tensor_fields = ("exp_avg", "exp_avg_sq")
    hyper = RAdamHyper

    def scalars(self, counts: SegmentCounters, hyper: RAdamHyper) -> tuple[float, ...]:
        """Return the sign, both weight decays, 1 − β₁, β₂, 1 − β₂, 1 − β₁ᵗ, lr, epsilon, √(1 − β₂ᵗ), r or 0, ρₜ > 5."""
        beta1, beta2 = hyper.betas
        step = counts.step + 1
        correction2 = 1 - beta2**step
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * (beta2**step) / correction2
        rectified = length > 5.0
        squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length) if rectified else 0.0
        return (
            sign_of(hyper.maximize),
            *decay_of(hyper.weight_decay, hyper.lr, decoupled=hyper.decoupled_weight_decay),
            1 - beta1,
            beta2,
            1 - beta2,
            1 - beta1**step,
            hyper.lr,
            hyper.eps,
            root(correction2),
            root(squared),
            float(rectified),
        )

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, shrink, rest1, beta2, rest2, correction1, lr, eps, root2, rectification, rectified = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        exp_avg = lerp(state["exp_avg"], g, rest1)
        exp_avg_sq = addcmul_(state["exp_avg_sq"] * beta2, g, g, rest2)
        step = divided(exp_avg, correction1) * lr
        if isinstance(rectified, Tensor):
            adaptive = step * (root2 / exp_avg_sq.sqrt().add_(eps)) * rectification
            step = torch.where(rectified != 0, adaptive, step)
        elif rectified:
            step = step * (root2 / exp_avg_sq.sqrt().add_(eps)) * rectification
        return add(shrunk(p, shrink), step, -1.0), {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
