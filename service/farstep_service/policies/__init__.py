"""What is done around a step, on whole buffers: gradients clipped and accumulated, parameters averaged."""

from farstep_service.policies.accumulating import Accumulated
from farstep_service.policies.averaging import Average
from farstep_service.policies.clipping import clipped_by_norm, clipped_by_value, coalesced, norm_of
from farstep_service.policies.finite import first_nonfinite_in
from farstep_service.policies.workspace import Workspace

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
