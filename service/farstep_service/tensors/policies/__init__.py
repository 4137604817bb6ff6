"""What is done around a step, on whole buffers: gradients clipped and accumulated, parameters averaged."""

from farstep_service.tensors.policies.accumulating import Accumulated
from farstep_service.tensors.policies.averaging import Average
from farstep_service.tensors.policies.clipping import clipped_by_norm, clipped_by_value, coalesced, norm_of
from farstep_service.tensors.policies.finite import first_nonfinite_in
from farstep_service.tensors.policies.workspace import Workspace

__all__ = [
    "Accumulated",
    "Average",
    "Workspace",
    "clipped_by_norm",
    "clipped_by_value",
    "coalesced",
    "first_nonfinite_in",
    "norm_of",
]
