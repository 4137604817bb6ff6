"""Adam: descent along an average of gradients over the root of an average of their squares.

    g          ← −g if maximize;  g ← g + λp, or p ← (1 − lr·λ)·p if the decay is decoupled
    exp_avg    ← exp_avg + (1 − β₁)·(g − exp_avg)
    exp_avg_sq ← β₂·exp_avg_sq + (1 − β₂)·g²
    v          ← exp_avg_sq, or max_exp_avg_sq ← max(max_exp_avg_sq, exp_avg_sq) with amsgrad
    p          ← p − lr / (1 − β₁ᵗ) · exp_avg / (√v / √(1 − β₂ᵗ) + ε)

t counts from 1; all state starts at 0. With amsgrad switched on later, torch fails for want of `max_exp_avg_sq`; here
the largest is taken from then on. Complex parameters are pairs of reals, in the maximum, too.

Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980 (2014); Reddi, Kale, Kumar, "On the
Convergence of Adam and Beyond", ICLR 2018, for amsgrad; order of operations as in torch 2.13,
`torch/optim/adam.py::_single_tensor_adam` without `capturable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import (
    addcdiv,
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
from farstep_service.optimizers.rule import ElementwiseRule, Fields, Scalar, SegmentCounters, StateTensors

LARGEST = "max_exp_avg_sq"


@dataclass(frozen=True, kw_only=True)
class AdamHyper(CommonHyper):
    """Options of Adam, with torch's names and defaults."""

    rule: ClassVar[str] = "Adam"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0
    amsgrad: bool = False
    capturable: bool = False
    fused: bool | None = None
    decoupled_weight_decay: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid epsilon value: {self.eps}", self.eps >= 0.0, field="eps")
        for index, beta in enumerate(self.betas):
            in_range(f"Invalid beta parameter at index {index}: {beta}", 0.0 <= beta < 1.0, field="betas")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")
        floats = all(isinstance(beta, float) for beta in self.betas)
        in_range("betas must be either both floats or both Tensors", floats, field="betas")
        both = bool(self.fused and self.foreach)
        in_range("`fused` and `foreach` cannot be `True` together.", not both, field="fused")


class Adam(ElementwiseRule[AdamHyper]):
    """The rule above."""

    name = "Adam"
    tensor_fields = ("exp_avg", "exp_avg_sq", LARGEST)
    optional_fields = (LARGEST,)
    hyper = AdamHyper

    def optional(self, hyper: AdamHyper) -> Fields:
        """Return the largest average of squares with amsgrad."""
        return (LARGEST,) if hyper.amsgrad else ()

    def scalars(self, counts: SegmentCounters, hyper: AdamHyper) -> tuple[float, ...]:
        """Return the sign, both weight decays, 1 − β₁, β₂, 1 − β₂, √(1 − β₂ᵗ), epsilon and −lr over 1 − β₁ᵗ."""
        beta1, beta2 = hyper.betas
        step = counts.step + 1
        return (
            sign_of(hyper.maximize),
            *decay_of(hyper.weight_decay, hyper.lr, decoupled=hyper.decoupled_weight_decay),
            1 - beta1,
            beta2,
            1 - beta2,
            root(1 - beta2**step),
            hyper.eps,
            -(hyper.lr / (1 - beta1**step)),
        )

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, shrink, rest1, beta2, rest2, correction, eps, minus_rate = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        exp_avg = lerp(state["exp_avg"], g, rest1)
        exp_avg_sq = addcmul_(state["exp_avg_sq"] * beta2, g, g, rest2)
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if LARGEST in state:
            new[LARGEST] = torch.maximum(state[LARGEST], exp_avg_sq)
        scale = divided(new.get(LARGEST, exp_avg_sq).sqrt(), correction).add_(eps)
        return addcdiv(shrunk(p, shrink), exp_avg, scale, minus_rate), new

    def check_sparse(self, hyper: AdamHyper) -> None:
        """Refuse sparse gradients in torch's words, which are Adam's for AdamW, too."""
        raise TensorMismatch(
            "Adam does not support sparse gradients, please consider SparseAdam instead",
            remedy="Send a dense gradient, or use an optimizer that takes sparse ones.",
        )
