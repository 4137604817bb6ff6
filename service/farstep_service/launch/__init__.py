"""Workers on this machine, started together and kept running: what `farstep launch` does."""

from farstep_service.launch.plan import Plan
from farstep_service.launch.run import Summary, launch

__all__ = ["Plan", "Summary", "launch"]
