"""RMSprop: steps over the root of an average of the gradients' squares.

    g               ← −g if maximize;  g ← g + λp
    square_avg      ← α·square_avg + (1 − α)·g²
    grad_avg        ← grad_avg + (1 − α)·(g − grad_avg)                             (if centered)
    d               = √(square_avg − grad_avg²) + ε if centered, else √square_avg + ε
    momentum_buffer ← μ·momentum_buffer + g / d;  p ← p − lr·momentum_buffer        (if μ > 0)
    p               ← p − lr·g / d                                                  (otherwise)

All state starts at 0; the step is counted and not used. With momentum or centering switched on later, torch fails for
want of their state; here it begins at 0 then.

Source: Hinton, "Neural Networks for Machine Learning", lecture 6 (2012); Graves, arXiv:1308.0850 (2013), for centering;
order of operations as in torch 2.13, `torch/optim/rmsprop.py::_single_tensor_rmsprop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import add, addcdiv, addcmul, addcmul_, decayed, lerp, sign_of, signed
from farstep_service.optimizers.rule import ElementwiseRule, Fields, Scalar, SegmentCounters, StateTensors

BUFFER = "momentum_buffer"
MEAN = "grad_avg"


@dataclass(frozen=True, kw_only=True)
class RMSpropHyper(CommonHyper):
    """Options of RMSprop, with torch's names and defaults."""

    rule: ClassVar[str] = "RMSprop"

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0
    momentum: float = 0
    centered: bool = False
    capturable: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid epsilon value: {self.eps}", self.eps >= 0.0, field="eps")
        in_range(f"Invalid momentum value: {self.momentum}", self.momentum >= 0.0, field="momentum")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")
        in_range(f"Invalid alpha value: {self.alpha}", self.alpha >= 0.0, field="alpha")


@final
class RMSprop(ElementwiseRule[RMSpropHyper]):
    """The rule above."""

    name = "RMSprop"
    tensor_fields = ("square_avg", BUFFER, MEAN)
    optional_fields = (BUFFER, MEAN)
    hyper = RMSpropHyper

    def optional(self, hyper: RMSpropHyper) -> Fields:
        """Return the buffer if there is momentum, and the mean of gradients if squares are centered."""
        return ((BUFFER,) if hyper.momentum > 0 else ()) + ((MEAN,) if hyper.centered else ())

    def scalars(self, counts: SegmentCounters, hyper: RMSpropHyper) -> tuple[float, ...]:
        """Return the sign, weight decay, α, 1 − α, epsilon, μ and −lr."""
        return (
            sign_of(hyper.maximize),
            hyper.weight_decay,
            hyper.alpha,
            1 - hyper.alpha,
            hyper.eps,
            hyper.momentum,
            -hyper.lr,
        )

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, alpha, rest, eps, momentum, minus_lr = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        square_avg = addcmul_(state["square_avg"] * alpha, g, g, rest)
        new = {"square_avg": square_avg}
        if MEAN in state:
            mean = new[MEAN] = lerp(state[MEAN], g, rest)
            scale = addcmul(square_avg, mean, mean, -1).sqrt_().add_(eps)
        else:
            scale = square_avg.sqrt().add_(eps)
        if BUFFER in state:
            buffer = new[BUFFER] = addcdiv(state[BUFFER] * momentum, g, scale, 1)
            return add(p, buffer, minus_lr), new
        return addcdiv(p, g, scale, minus_lr), new
