"""Muon: momentum, made orthogonal before it is applied; for the matrices of hidden layers.

    buf ← buf + (1 − μ)·(g − buf)
    u   ← g + μ·(buf − g) if nesterov, else buf
    o   ← the orthogonal matrix next to u, by Newton–Schulz iteration in bfloat16
    p   ← p − lr·λ·p
    p   ← p − adjusted lr·o

The iteration starts at x ← u/max(‖u‖, ε), wide rather than tall, and repeats x ← a·x + (b·A + c·A²)·x with A = x·xᵀ.
The adjusted rate of an n × m matrix is lr·√max(1, n/m) (`original`) or lr·0.2·√max(n, m) (`match_rms_adamw`).

torch counts no steps here. It normalises u in the memory of the buffer where that is bfloat16 and there is no Nesterov
momentum; since its numbers are the measure, so does this.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
kellerjordan.github.io/posts/muon, and Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv:2502.16982; order of
operations as in torch 2.13, `torch/optim/_muon.py::_single_tensor_muon`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.hyper import Hyper, in_range
from farstep_service.layout import Layout
from farstep_service.optimizers.rule import Scalar, SegmentCounters, StateTensors, TensorRule

BUFFER = "momentum_buffer"
MOST_STEPS = 100
ADJUSTMENTS = ("original", "match_rms_adamw")


@dataclass(frozen=True, kw_only=True)
class MuonHyper(Hyper):
    """Options of Muon, with torch's names and defaults."""

    rule: ClassVar[str] = "Muon"

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, ...] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Learning rate should be >= 0 but is: {self.lr}", self.lr >= 0.0, field="lr")
        in_range(f"momentum should be >= 0 but is: {self.momentum}", self.momentum >= 0.0, field="momentum")
        in_range(
            f"weight decay should be >= 0 but is: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay"
        )
        in_range(
            f"Adjust learning rate function {self.adjust_lr_fn} is not supported",
            self.adjust_lr_fn is None or self.adjust_lr_fn in ADJUSTMENTS,
            field="adjust_lr_fn",
        )


@final
class Muon(TensorRule[MuonHyper]):
    """The rule above."""

    name = "Muon"
    tensor_fields = (BUFFER,)
    segment_fields = ()
    hyper = MuonHyper

    def scalars(self, counts: SegmentCounters, hyper: MuonHyper) -> tuple[float, ...]:
        """Return μ, Nesterov or not, ε, how many iterations, lr, what weight decay leaves of p, how lr is adjusted
        (0: original, 1: like AdamW, 2: not at all) and the three coefficients.
        """
        in_range(
            "Number of steps must be less than 100 for computational efficiency",
            hyper.ns_steps < MOST_STEPS,
            field="ns_steps",
        )
        in_range(
            "Coefficients must be a tuple of exactly 3 values", len(hyper.ns_coefficients) == 3, field="ns_coefficients"
        )
        numbers = (hyper.eps, *hyper.ns_coefficients)
        in_range(
            f"The iteration is in bfloat16, which does not hold all of {numbers}",
            all(abs(number) <= torch.finfo(torch.bfloat16).max for number in numbers),
            field="ns_coefficients",
        )
        named = hyper.adjust_lr_fn or ADJUSTMENTS[0]
        return (
            hyper.momentum,
            float(hyper.nesterov),
            hyper.eps,
            float(hyper.ns_steps),
            hyper.lr,
            1 - hyper.lr * hyper.weight_decay,
            float(ADJUSTMENTS.index(named) if named in ADJUSTMENTS else len(ADJUSTMENTS)),
            *hyper.ns_coefficients,
        )

    def advance(self, counts: SegmentCounters, hyper: MuonHyper) -> SegmentCounters:
        """Return the counts as they are: nothing is counted."""
        return counts

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        momentum, nesterov, eps, steps, lr, keep, adjustment, *coefficients = map(float, scalars)
        buffer = state[BUFFER].lerp(g, 1 - momentum)
        update = g.lerp(buffer, momentum) if nesterov else buffer
        update = _orthogonal(update, coefficients, int(steps), eps)
        rate = lr * _ratio(int(adjustment), *p.shape)
        limit = torch.finfo(p.dtype).max
        alpha = -rate if abs(rate) <= limit else -math.copysign(math.inf, rate)
        return p.mul(keep).add_(update, alpha=alpha), {BUFFER: buffer}

    def check_layout(self, layout: Layout) -> None:
        """Refuse all but matrices."""
        for segment in layout.segments:
            if len(segment.shape) != 2:
                raise TensorMismatch(
                    "Muon only supports 2D parameters whereas we found a parameter with size: "
                    f"{torch.Size(segment.shape)}",
                    field=segment.name,
                    remedy="Give biases, scalars and kernels of convolutions to another optimizer.",
                )


def _orthogonal(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return the Newton–Schulz iterate of a matrix of ours, in bfloat16; see the top about its memory."""
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    if tall:
        x = x.T
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _ratio(adjustment: int, rows: int, columns: int) -> float:
    """Return what the learning rate of a matrix is multiplied by."""
    if adjustment == 0:
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if adjustment == 1 else 1.0
