"""What a case may differ by, and why.

    float32, float64        0: every bit
    bfloat16, float16       4 units in the last place of the tensor's largest element, and one of the number 1
    complex64, complex128   torch's own tolerance for the dtype; 0 where a session computes with complex numbers, too
    fused kernels           torch's own tolerance for the dtype, also for its own fused implementations

A case that is `inexact`, for the reason it gives, has float32's tolerance in every dtype that is finer.
"""

from __future__ import annotations

import torch

from tests.parity.cases import Case
from tests.parity.comparison import Tolerance

SINGLE = Tolerance(1.3e-6, 1e-5)
DOUBLE = Tolerance(1e-7, 1e-7)


def _half(dtype: torch.dtype) -> Tolerance:
    unit = torch.finfo(dtype).eps
    return Tolerance(4 * unit, unit)


EXACT = {
    torch.float32: Tolerance(),
    torch.float64: Tolerance(),
    torch.bfloat16: _half(torch.bfloat16),
    torch.float16: _half(torch.float16),
    torch.complex64: SINGLE,
    torch.complex128: DOUBLE,
}
CLOSE = EXACT | {torch.float32: SINGLE, torch.float64: DOUBLE}

COMPLEX = frozenset({"SGD"})
"""Optimizers whose complex parameters are compared bit by bit."""

REASONS = {
    torch.float32: "the same operations in the same order",
    torch.float64: "the same operations in the same order",
    torch.bfloat16: "torch rounds the last elements of a tensor, which fill no vector register, otherwise than "
    "the rest; the flat memory of a session has other ends",
    torch.float16: "as bfloat16",
    torch.complex64: "what torch does to complex numbers as such (weight decay, momentum, division) a session does to "
    "pairs of real ones",
    torch.complex128: "as complex64",
}


def tolerance(case: Case, dtype: torch.dtype, kernel: str) -> Tolerance:
    """Return what a case may differ by in a dtype."""
    usual = (CLOSE if kernel == "fused" else EXACT)[dtype]
    if kernel != "fused" and dtype.is_complex and case.name in COMPLEX:
        usual = Tolerance()
    return SINGLE if case.inexact and usual.atol < SINGLE.atol else usual
