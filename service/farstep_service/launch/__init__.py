"""Start workers on this machine and keep them running: `farstep launch`."""

from farstep_service.launch.plan import LaunchPlan
from farstep_service.launch.run import Summary, launch

__all__ = ["LaunchPlan", "Summary", "launch"]
