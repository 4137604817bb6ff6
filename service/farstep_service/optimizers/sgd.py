"""SGD: descent along the gradient, with momentum if asked for.

    g   ← −g if maximize;  g ← g + λp
    buf ← g in the first step with momentum, later μ·buf + (1 − dampening)·g        (if μ ≠ 0)
    g   ← g + μ·buf if nesterov, else buf                                           (if μ ≠ 0)
    p   ← p − lr·g

In the first step with momentum a compiled kernel finds zeros in the buffer, which it keeps 0 of, and g counts once.

torch counts no steps here, and without momentum there is no state at all. Without momentum a sparse gradient changes
the rows it names and no other. With momentum the rows of earlier gradients go on moving: torch keeps them in a sparse
buffer, here the gradient is made dense and the buffer is, with the same numbers.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, for Nesterov's
momentum; order of operations as in torch 2.13, `torch/optim/sgd.py::_single_tensor_sgd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.hyper import CommonHyper, in_range
from farstep_service.optimizers.arithmetic import add, add_, decayed, sign_of, signed
from farstep_service.optimizers.rule import ElementwiseRule, Fields, RowRule, Scalar, SegmentCounters, StateTensors

BUFFER = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class SGDHyper(CommonHyper):
    """Options of SGD, with torch's names and defaults."""

    rule: ClassVar[str] = "SGD"

    lr: float = 1e-3
    momentum: float = 0
    dampening: float = 0
    weight_decay: float = 0
    nesterov: bool = False
    fused: bool | None = None

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in the same order and words."""
        in_range(f"Invalid learning rate: {self.lr}", not self.lr < 0.0, field="lr")
        in_range(f"Invalid momentum value: {self.momentum}", self.momentum >= 0.0, field="momentum")
        in_range(f"Invalid weight_decay value: {self.weight_decay}", self.weight_decay >= 0.0, field="weight_decay")
        fits = not self.nesterov or (self.momentum > 0 and self.dampening == 0)
        in_range("Nesterov momentum requires a momentum and zero dampening", fits, field="nesterov")
        both = bool(self.fused and self.foreach)
        in_range("`fused` and `foreach` cannot be `True` together.", not both, field="fused")


@final
class SGD(ElementwiseRule[SGDHyper], RowRule[SGDHyper]):
    """The rule above."""

    name = "SGD"
    tensor_fields = (BUFFER,)
    optional_fields = (BUFFER,)
    segment_fields = ()
    usual = ((), (BUFFER,))
    complex_numbers = True
    hyper = SGDHyper

    def optional(self, hyper: SGDHyper) -> Fields:
        """Return the buffer if there is momentum."""
        return (BUFFER,) if hyper.momentum != 0 else ()

    def scalars(self, counts: SegmentCounters, hyper: SGDHyper) -> tuple[float, ...]:
        """Return the sign, weight decay, Nesterov or not, μ, the weights of the old buffer and of g in it, and −lr."""
        first = BUFFER not in counts.fields
        return (
            sign_of(hyper.maximize),
            hyper.weight_decay,
            float(hyper.nesterov),
            hyper.momentum,
            0.0 if first else hyper.momentum,
            1.0 if first else 1 - hyper.dampening,
            -hyper.lr,
        )

    def advance(self, counts: SegmentCounters, hyper: SGDHyper) -> SegmentCounters:
        """Return the counts as they are: nothing is counted."""
        return counts

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula above."""
        sign, weight_decay, nesterov, momentum, keep, rest, minus_lr = scalars
        g = decayed(signed(g, sign), p, weight_decay)
        if BUFFER not in state:
            return add(p, g, minus_lr), {}
        later = isinstance(keep, Tensor) or keep != 0
        buffer = add_(state[BUFFER] * keep, g, rest) if later else g.clone()
        if isinstance(nesterov, Tensor):
            g = torch.where(nesterov != 0, add(g, buffer, momentum), buffer)
        else:
            g = add(g, buffer, momentum) if nesterov else buffer
        return add(p, g, minus_lr), {BUFFER: buffer}

    def check_sparse(self, hyper: SGDHyper) -> None:
        """Refuse weight decay, as torch does."""
        if hyper.weight_decay != 0:
            raise TensorMismatch(
                "add(sparse, dense) is not supported. Use add(dense, sparse) instead.",
                field="weight_decay",
                remedy="Put the sparse parameter into a group with weight_decay=0.",
            )

    def by_rows(self, hyper: SGDHyper) -> bool:
        """Say that momentum moves other rows, too."""
        return hyper.momentum == 0

    def update_rows(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[float]
    ) -> tuple[Tensor, StateTensors]:
        """Apply the formula to the touched rows, with torch's own sparse operation so that the bits are torch's."""
        g = signed(g, scalars[0])
        index = torch.arange(g.shape[0], device=g.device).unsqueeze(0)
        rows = torch.sparse_coo_tensor(index, g, g.shape, device=g.device, check_invariants=False)
        return torch.add(p, rows, alpha=scalars[-1]), {}
