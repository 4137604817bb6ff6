"""Kernels that run the rules over memory: torch's own operations, or programs compiled ahead of time."""

from farstep_service.kernels.kernel import Call, Kernel, KernelSource, Position, Progress, Rerun, Write, cut
from farstep_service.kernels.kernels import MODES, Kernels, KernelStatus, Mode, possible, usual

__all__ = [
    "MODES",
    "Call",
    "Kernel",
    "KernelSource",
    "KernelStatus",
    "Kernels",
    "Mode",
    "Position",
    "Progress",
    "Rerun",
    "Write",
    "cut",
    "possible",
    "usual",
]
