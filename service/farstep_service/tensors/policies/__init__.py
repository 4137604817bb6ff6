"""What policies need of a session: gradients to change, a sum that waits for more rounds, an average of parameters."""

from farstep_service.tensors.policies.accumulating import Accumulated, Take, layout_of, taken
from farstep_service.tensors.policies.averaging import Average
from farstep_service.tensors.policies.gradients import StepGradients, Workspace, coalesced, through

__all__ = ["Accumulated", "Average", "StepGradients", "Take", "Workspace", "coalesced", "layout_of", "taken", "through"]
