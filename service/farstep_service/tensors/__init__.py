"""What the steps of a session change: parameters, optimizer state and options in force."""

from farstep_service.tensors.snapshot import Snapshot, TensorsRecord
from farstep_service.tensors.state import SessionState
from farstep_service.tensors.steps import Left, Steps
from farstep_service.tensors.tensors import Tensors, state_of

__all__ = ["Left", "SessionState", "Snapshot", "Steps", "Tensors", "TensorsRecord", "state_of"]
