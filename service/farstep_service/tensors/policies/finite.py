"""Whether the gradients of a step are finite, once they are summed."""

from __future__ import annotations

import torch
from torch import Tensor

from farstep_service.store import Gradients
from farstep_service.tensors.finite import all_finite
from farstep_service.tensors.policies.workspace import pieces


def first_nonfinite_in(gradients: Gradients) -> int | None:
    """Return the first segment whose gradient holds NaN or Inf, None if all are finite.

    Several finite gradients may have a sum that is not.
    """
    dense = gradients.dense()
    for (span,) in pieces(gradients.buffers.layout, dense, gradients.buffers):
        if not all_finite(_flat(span)):
            break
    else:
        dense = []
    for index in dense:
        if not all_finite(_flat(gradients.buffers.segment(index))):
            return index
    for index, (_, values) in gradients.sparse.items():
        if not all_finite(_flat(values)):
            return index
    return None


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
