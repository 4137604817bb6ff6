"""ASGD: plain descent whose average over time is kept beside the parameters.

    g   ← −g if maximize;  g ← g + wd·p
    p   ← (1 − lambd·eta)·p − eta·g
    ax  ← p if mu = 1, else ax + mu·(p − ax)
    eta ← lr / (1 + lambd·lr·t)^alpha
    mu  ← 1 / max(1, t − t0)

t counts from 1. eta and mu are numbers of each segment: eta is the learning rate of the first step at first, and each
step uses what the step before left, so a change of lr acts one step late, as in torch. Both are rounded to float32, as
torch rounds them, whatever the dtype of the parameter, and from a load of state on also to the dtype that torch gives
its state tensors then, the parameter's. torch checks neither lambd nor alpha nor t0.

Source: Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30(4) (1992);
order of operations as in torch 2.13, `torch/optim/asgd.py::_single_tensor_asgd` without `capturable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from farstep.protocol.fields import SINGLE
from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import add_, decayed, float32, rounded, sign_of, signed
from farstep_service.optimizers.rule import PRECISION, ElementwiseRule, Scalar, SegmentCounters, StateTensors


@dataclass(frozen=True, kw_only=True)
class ASGDHyper(CommonHyper):
    """Options of ASGD, with torch's names and defaults."""

    rule: ClassVar[str] = "ASGD"

    lr: float = 1e-2
    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    weight_decay: float = 0
    capturable: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")


@dataclass(frozen=True, slots=True)
class ASGDCounts(SegmentCounters):
    """Numbers of one segment.

    Attributes:
        eta: the rate of the next step, rounded to its dtype.
        mu: the weight of the next parameters in the average, rounded to its dtype; 1 until averaging starts.
        precision: the significand bits of that dtype.
    """

    eta: float = 0.0
    mu: float = 1.0
    precision: int = SINGLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", rounded(self.eta, self.precision))
        object.__setattr__(self, "mu", rounded(self.mu, self.precision))


@final
class ASGD(ElementwiseRule[ASGDHyper]):
    """The rule above."""

    name = "ASGD"
    tensor_fields = ("ax",)
    segment_fields = ("step", "eta", "mu")
    own_fields = (PRECISION,)
    hyper = ASGDHyper
    counts = ASGDCounts

    def first(self, hyper: ASGDHyper) -> SegmentCounters:
        """Return eta at the learning rate of now."""
        return ASGDCounts(0, hyper.lr)

    def scalars(self, counts: SegmentCounters, hyper: ASGDHyper) -> tuple[float, ...]:
        """Return the sign, weight decay, 1 − lambd·eta, −eta and mu."""
        now = cast(ASGDCounts, counts)
        return (sign_of(hyper.maximize), hyper.weight_decay, 1 - hyper.lambd * now.eta, -now.eta, now.mu)

    def advance(self, counts: SegmentCounters, hyper: ASGDHyper) -> SegmentCounters:
        """Return the next step's eta and mu."""
        step = counts.step + 1
        eta = float32(hyper.lr / ((1 + hyper.lambd * hyper.lr * step) ** hyper.alpha))
        mu = float32(1 / max(1, step - hyper.t0))
        return ASGDCounts(step, eta, mu, cast(ASGDCounts, counts).precision, fields=counts.fields)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        ax = state["ax"]
        sign, weight_decay, shrink, minus_eta, mu = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        p = add_(p * shrink, g, minus_eta)
        if isinstance(mu, Tensor):
            return p, {"ax": torch.where(mu != 1, ax + (p - ax) * mu, p)}
        return p, {"ax": (p - ax).mul_(mu).add_(ax) if mu != 1 else p}
