"""Say what a benchmark ran on, in one line that goes above its table."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import torch


def hardware() -> str:
    """Return processor, cores, date and versions."""
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; {date.today():%Y-%m-%d}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown processor"
