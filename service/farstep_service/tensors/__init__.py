"""What the steps of a session change: parameters, optimizer state and options in force."""

from farstep_service.tensors.beginning import state_of
from farstep_service.tensors.state import SessionState
from farstep_service.tensors.steps import Left, Steps

__all__ = ["Left", "SessionState", "Steps", "state_of"]
