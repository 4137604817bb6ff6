"""How many CPUs this process may use, as the machine or the container says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus(quota: Path = QUOTA) -> int:
    """Return how many CPUs this process may use: its affinity, and the quota of its container rounded up.

    Args:
        quota: the control group's file, `<microseconds> <period>` or `max <period>`.
    """
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
        return max(1, min(cpus, -(-int(allowed) // int(period))))
    except (OSError, ValueError):  # no control groups, or `max`
        return cpus
