"""Rprop: steps of a size per element that grows while the gradient keeps its sign, and shrinks when it turns.

    g         ← −g if maximize
    step_size ← step_size·η₊ if g·prev > 0, step_size·η₋ if g·prev < 0, else as it was; kept between both step_sizes
    g         ← 0 where g·prev < 0
    p         ← p − sign(g)·step_size
    prev      ← g

prev starts at 0, step_size at the learning rate of the first step (both parts of a complex parameter do); lr has no
other use. The step is counted and not used.

Source: Riedmiller, Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", ICNN
1993; order of operations as in torch 2.13, `torch/optim/rprop.py::_single_tensor_rprop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import addcmul, sign_of, signed
from farstep_service.optimizers.rule import ElementwiseRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class RpropHyper(CommonHyper):
    """Options of Rprop, with torch's names and defaults."""

    rule: ClassVar[str] = "Rprop"

    lr: float = 1e-2
    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50)
    capturable: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        lower, upper = self.etas
        in_range(f"Invalid eta values: {lower}, {upper}", 0.0 < lower < 1.0 < upper, field="etas")


@final
class Rprop(ElementwiseRule[RpropHyper]):
    """The rule above."""

    name = "Rprop"
    tensor_fields = ("prev", "step_size")
    hyper = RpropHyper

    def scalars(self, counts: SegmentCounters, hyper: RpropHyper) -> tuple[float, ...]:
        """Return the sign, both etas, both step sizes, first step or not, and the step size of the first."""
        return (sign_of(hyper.maximize), *hyper.etas, *hyper.step_sizes, float(not counts.fields), hyper.lr)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, *others = scalars
        # Rounded as the elements are, since torch compares elements with them.
        minus, plus, least, most, first, start = (
            torch.as_tensor(each, dtype=p.dtype, device=p.device) for each in others
        )
        g = signed(g, sign)
        step_size = torch.where(first != 0, start, state["step_size"])
        turned = g * state["prev"]
        # torch replaces signs in place, the zeros last: an eta that rounds to zero becomes one.
        shrink = torch.where(minus == 0, 1.0, minus)
        factor = torch.where(turned > 0, plus, torch.where(turned < 0, shrink, 1.0))
        step_size = torch.minimum(torch.maximum(step_size * factor, least), most)
        g = torch.where(factor == minus, 0.0, g)
        return addcmul(p, g.sign(), step_size, -1), {"prev": g, "step_size": step_size}
