"""What the steps of a session change: parameters, optimizer state and options in force."""

from farstep_service.tensors.snapshot import Snapshot, TensorsRecord
from farstep_service.tensors.state import SessionState
from farstep_service.tensors.steps import Steps
from farstep_service.tensors.tensors import Tensors, state_of

__all__ = ["SessionState", "Snapshot", "Steps", "Tensors", "TensorsRecord", "state_of"]
