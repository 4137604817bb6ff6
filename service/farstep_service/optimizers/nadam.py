"""NAdam: Adam with Nesterov's momentum, whose weight grows over time.

    g          ← −g if maximize;  g ← g + λp, or p ← (1 − lr·λ)·p if the decay is decoupled
    μₜ         = β₁·(1 − ½·0.96^(t·ψ)),  ψ the momentum_decay;  mu_product ← mu_product·μₜ
    exp_avg    ← exp_avg + (1 − β₁)·(g − exp_avg)
    exp_avg_sq ← β₂·exp_avg_sq + (1 − β₂)·g²
    d          = √(exp_avg_sq / (1 − β₂ᵗ)) + ε
    p          ← p − lr·(1 − μₜ) / (1 − mu_product) · g / d − lr·μₜ₊₁ / (1 − mu_product·μₜ₊₁) · exp_avg / d

t counts from 1. mu_product is a number of each segment, 1 at first, and rounded after each product as torch's state
tensor rounds it: to float32, whatever the dtype of the parameter, and from a load of state on to the dtype that torch
gives it then, the parameter's.

Source: Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016; order of operations as in torch 2.13,
`torch/optim/nadam.py::_single_tensor_nadam` without `capturable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast, final

from torch import Tensor

from farstep.protocol.fields import SINGLE
from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import (
    addcdiv,
    addcmul_,
    decay_of,
    decayed,
    divided,
    float32,
    lerp,
    rounded,
    shrunk,
    sign_of,
    signed,
)
from farstep_service.optimizers.rule import PRECISION, ElementwiseRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class NAdamHyper(CommonHyper):
    """Options of NAdam, with torch's names and defaults."""

    rule: ClassVar[str] = "NAdam"

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False
    capturable: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid epsilon value: {self.eps}", self.eps >= 0.0, field="eps")
        for index, beta in enumerate(self.betas):
            in_range(f"Invalid beta parameter at index {index}: {beta}", 0.0 <= beta < 1.0, field="betas")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")
        in_range(
            f"Invalid momentum_decay value: {self.momentum_decay}", self.momentum_decay >= 0.0, field="momentum_decay"
        )


@dataclass(frozen=True, slots=True)
class NAdamCounts(SegmentCounters):
    """Numbers of one segment.

    Attributes:
        mu_product: the product of the weights of all steps, rounded to its dtype.
        precision: the significand bits of that dtype.
    """

    mu_product: float = 1.0
    precision: int = SINGLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu_product", rounded(self.mu_product, self.precision))


@final
class NAdam(ElementwiseRule[NAdamHyper]):
    """The rule above."""

    name = "NAdam"
    tensor_fields = ("exp_avg", "exp_avg_sq")
    segment_fields = ("step", "mu_product")
    own_fields = (PRECISION,)
    hyper = NAdamHyper
    counts = NAdamCounts

    def scalars(self, counts: SegmentCounters, hyper: NAdamHyper) -> tuple[float, ...]:
        """Return the sign, both weight decays, 1 − β₁, β₂, 1 − β₂, 1 − β₂ᵗ, epsilon and the rates of g and exp_avg."""
        beta1, beta2 = hyper.betas
        step = counts.step + 1
        product = cast(NAdamCounts, self.advance(counts, hyper)).mu_product
        now, following = _mu(step, hyper), _mu(step + 1, hyper)
        return (
            sign_of(hyper.maximize),
            *decay_of(hyper.weight_decay, hyper.lr, decoupled=hyper.decoupled_weight_decay),
            1 - beta1,
            beta2,
            1 - beta2,
            1 - beta2**step,
            hyper.eps,
            -hyper.lr * (1.0 - now) / (1.0 - product),
            (-hyper.lr * following) / (1.0 - product * following),
        )

    def advance(self, counts: SegmentCounters, hyper: NAdamHyper) -> SegmentCounters:
        """Return the next step's mu_product."""
        now, weight = cast(NAdamCounts, counts), _mu(counts.step + 1, hyper)
        double = now.precision > SINGLE
        # torch multiplies in float32 what it keeps in 16 bits.
        product = now.mu_product * weight if double else float32(now.mu_product * float32(weight))
        return NAdamCounts(counts.step + 1, product, now.precision, fields=counts.fields)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, shrink, rest1, beta2, rest2, correction, eps, minus_g_rate, minus_avg_rate = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        exp_avg = lerp(state["exp_avg"], g, rest1)
        exp_avg_sq = addcmul_(state["exp_avg_sq"] * beta2, g, g, rest2)
        scale = divided(exp_avg_sq, correction).sqrt().add_(eps)
        p, new = shrunk(p, shrink), {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if isinstance(minus_g_rate, Tensor):
            # One division less, and divisions are what a compiled NAdam waits for.
            return p + (minus_g_rate * g + minus_avg_rate * exp_avg) / scale, new
        return addcdiv(addcdiv(p, g, scale, minus_g_rate), exp_avg, scale, minus_avg_rate), new


def _mu(step: int, hyper: NAdamHyper) -> float:
    """Return the weight of the momentum in a step."""
    return float(hyper.betas[0] * (1.0 - 0.5 * (0.96 ** (step * hyper.momentum_decay))))
