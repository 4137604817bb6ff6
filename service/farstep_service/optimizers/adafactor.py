"""Adafactor: second moments of a matrix kept as one number per row and one per column.

    g     ← −g if maximize
    β     ← t^beta2_decay;  ρ ← min(lr, 1/√t);  α ← max(ε₂, RMS(p))·ρ
    p     ← p − lr·λ·p
    row   ← row + β·(mean of g² over each row − row);  col ← the same over each column      (two dimensions or more)
    v     ← row·col / max(mean of row, ε₁)
    v     ← v + β·(g² − v)                                                                  (fewer: `variance`)
    u     ← g / √max(v, ε₁²)
    p     ← p − α / max(1, RMS(u)/d) · u

t counts from 1. Rows and columns are those of the last two dimensions. ε₁ = None is the machine epsilon of the
parameter's dtype; torch takes that of the first parameter of a group for all of them, which differs where dtypes are
mixed.

Source: Shazeer, Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018, arXiv:1804.04235;
order of operations as in torch 2.13, `torch/optim/_adafactor.py::_single_tensor_adafactor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

import torch
from torch import Tensor

from farstep.protocol.hyper import Hyper, in_range
from farstep_service.optimizers.arithmetic import sign_of, signed
from farstep_service.optimizers.rule import Scalar, SegmentCounters, StateTensors, TensorRule

ROWS, COLUMNS, VECTOR = "row_var", "col_var", "variance"


@dataclass(frozen=True, kw_only=True)
class AdafactorHyper(Hyper):
    """Options of Adafactor, with torch's names and defaults."""

    rule: ClassVar[str] = "Adafactor"

    lr: float = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: float = 0.0
    foreach: bool | None = None
    maximize: bool = False

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        first, second = self.eps
        in_range(f"Learning rate should be >= 0 but is: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"beta2_decay should be <= 0 but is: {self.beta2_decay}", self.beta2_decay <= 0.0, field="beta2_decay")
        in_range(f"epsilon1 should be >= 0 but is: {first}", first is None or first >= 0.0, field="eps")
        in_range(f"epsilon2 should be >= 0 but is: {second}", second >= 0.0, field="eps")
        in_range(f"Clipping threshold d should be >= 1 but is: {self.d}", self.d >= 1.0, field="d")
        in_range(
            f"weight_decay should be >= 0 but is: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay"
        )


@final
class Adafactor(TensorRule[AdafactorHyper]):
    """The rule above."""

    name = "Adafactor"
    tensor_fields = (ROWS, COLUMNS, VECTOR)
    special = MappingProxyType({ROWS: "rows", COLUMNS: "columns", VECTOR: "vector"})
    hyper = AdafactorHyper

    def scalars(self, counts: SegmentCounters, hyper: AdafactorHyper) -> tuple[float, ...]:
        """Return the sign, β, ρ, what weight decay leaves of p, whether ε₁ is given, ε₁ and ε₁² or 0, ε₂ and d."""
        in_range("Clipping threshold d is 0, by which a step divides", hyper.d != 0, field="d")
        step = float(counts.step + 1)
        first, second = hyper.eps
        eps1 = first or 0.0
        return (
            sign_of(hyper.maximize),
            step**hyper.beta2_decay,
            min(hyper.lr, 1 / (step**0.5)),
            1 - hyper.lr * hyper.weight_decay,
            float(first is not None),
            eps1,
            eps1 * eps1,
            second,
            hyper.d,
        )

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, rest, rho, keep, given, eps1, least, eps2, d = map(float, scalars)
        g = signed(g, sign)
        if not given:
            eps1 = torch.finfo(p.dtype).eps
            least = eps1 * eps1
        alpha = max(eps2, p.norm(2).item() / (p.numel() ** 0.5)) * rho
        new: dict[str, Tensor] = {}
        if ROWS in state:
            # The norm makes no temporary of g's size, as a mean of g² would.
            row_mean = torch.norm(g, dim=-1, keepdim=True).square_().div_(g.size(-1))
            new[ROWS] = state[ROWS].lerp(row_mean, rest)
            column_mean = torch.norm(g, dim=-2, keepdim=True).square_().div_(g.size(-2))
            new[COLUMNS] = state[COLUMNS].lerp(column_mean, rest)
            estimate = new[ROWS] @ new[COLUMNS]
            estimate.div_(new[ROWS].mean(dim=-2, keepdim=True).clamp_(min=eps1))
        else:
            new[VECTOR] = state[VECTOR].lerp(g * g, rest)
            estimate = new[VECTOR].clone()
        update = estimate.clamp_(min=least).rsqrt_().mul_(g)
        denominator = max(1.0, update.norm(2).item() / ((update.numel() ** 0.5) * d))
        return p.mul(keep).add_(update, alpha=-alpha / denominator), new
