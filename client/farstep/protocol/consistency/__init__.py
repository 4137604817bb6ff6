"""How the pushes of several workers become steps: the modes a session can be in, and their options."""

from farstep.protocol.consistency.bounded import Bounded
from farstep.protocol.consistency.mode import Async, Mode, StalenessScaling
from farstep.protocol.consistency.sync import Sync
from farstep.protocol.consistency.table import MODES, Consistency, checked, from_options, to_options

__all__ = [
    "MODES",
    "Async",
    "Bounded",
    "Consistency",
    "Mode",
    "StalenessScaling",
    "Sync",
    "checked",
    "from_options",
    "to_options",
]
