"""The machine's resources for this process: memory and CPUs; the error for a failed allocation; signal handlers.

The lowest of these memory limits counts, because a process that exceeds it is killed:

    the machine          /proc/meminfo
    its containers       control groups, of version 2 and of version 1: the process's own, and each around it
    the process itself   RLIMIT_AS and RLIMIT_DATA
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from farstep.errors import OutOfMemory

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


MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_FILES: Final = {
    "memory.max": ("memory.current", "inactive_file"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}
"""By the file of a control group's limit: the file of its use, and the key of its droppable part."""
_HIERARCHICAL: Final = "hierarchical_memory_limit"
"""Version 1's limit of a group and its ancestors, also of those outside a container."""
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|B|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS: Final = {"bytes": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def available_bytes(
    device: str = "cpu", *, meminfo: Path = MEMINFO, cgroup: Path = CGROUP, membership: Path = MEMBERSHIP
) -> int | None:
    """Return the memory available on a device now, None if unknown.

    On the CPU that is the kernel's available memory, or less in a container with a limit; file pages that could be
    dropped count as available.

    Args:
        device: a torch device.
        meminfo, cgroup, membership: where Linux says it.
    """
    if not device.startswith("cpu"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0]) if device.startswith("cuda") else None
    kib = _numbers(meminfo).get("MemAvailable:")
    found = [] if kib is None else [kib * 1024]
    taken = _pages(0)
    found += [max(0, limit - taken) for limit in _limits_of_process()]
    for group in _groups(cgroup, membership):
        for limit_file, (use_file, droppable) in _FILES.items():
            limit, used = _number(group / limit_file), _number(group / use_file)
            if limit is not None and used is not None:
                found.append(max(0, limit - used + _numbers(group / "memory.stat").get(droppable, 0)))
    return min(found, default=None)


def usable_bytes(
    device: str = "cpu", *, meminfo: Path = MEMINFO, cgroup: Path = CGROUP, membership: Path = MEMBERSHIP
) -> int | None:
    """Return the memory of a device that this process may use in total, None if unknown.

    On the CPU that is the memory of the machine, or the lowest limit of the process and its containers.

    Args:
        device: a torch device.
        meminfo, cgroup, membership: where Linux says it.
    """
    if not device.startswith("cpu"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[1]) if device.startswith("cuda") else None
    kib = _numbers(meminfo).get("MemTotal:")
    found = [*_limits_of_process(), *([] if kib is None else [kib * 1024])]
    for group in _groups(cgroup, membership):
        limits = [_number(group / limit_file) for limit_file in _FILES]
        limits.append(_numbers(group / "memory.stat").get(_HIERARCHICAL))
        found += [limit for limit in limits if limit is not None]
    return min(found, default=None)


def resident_bytes() -> int:
    """Return the memory of this process, 0 if unknown."""
    return _pages(1)


def out_of_memory(exc: BaseException, what: str) -> OutOfMemory | None:
    """Return the error for a failed allocation, None for another exception.

    Args:
        exc: a MemoryError, or torch's equivalent.
        what: the request, as the beginning of a sentence.
    """
    text = str(exc)
    if not (
        isinstance(exc, MemoryError)
        or type(exc).__name__ == "OutOfMemoryError"  # torch's, for CUDA; this module does not load torch
        or (isinstance(exc, RuntimeError) and ("allocate memory" in text or "out of memory" in text))
    ):
        return None
    found = _ASKED.search(text)
    asked = int(float(found[1]) * _UNITS[found[2].lower()]) if found else None
    device = "cuda" if "CUDA" in text and _has_cuda() else "cpu"
    there = available_bytes(device)
    much = "" if asked is None else f" for {asked} bytes"
    left = "" if there is None else f"; {there} are available"
    return OutOfMemory(
        f"{what} found no memory{much}{left}.",
        remedy="Try again, remove a session that is done, or give the server more memory.",
        asked=asked,
        available=there,
    )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _pages(column: int) -> int:
    """Return the address space of this process (column 0), or its resident part (column 1), in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _limits_of_process() -> list[int]:
    if sys.platform != "linux":
        return []
    import resource

    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return [limit for limit in limits if limit != resource.RLIM_INFINITY]


def _groups(cgroup: Path, membership: Path) -> Iterator[Path]:
    """Yield the directories of this process's control groups, up to their mount.

    The paths are those that the process sees. A container without a namespace of its own sees the machine's, which do
    not exist under its mount; there its own group is the mount itself.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    mounts = {cgroup: "/", cgroup / "unified": "/", cgroup / "memory": "/"}
    for words in lines:
        if len(words) == 3 and (not words[1] or "memory" in words[1].split(",")):
            roots = (cgroup, cgroup / "unified") if not words[1] else (cgroup / "memory",)
            mounts |= dict.fromkeys(roots, words[2])
    for root, path in mounts.items():
        own = root / path.lstrip("/")
        yield own
        while own != root:
            own = own.parent
            yield own


def _number(file: Path) -> int | None:
    """Return the number in a file, None without a file or for another content, such as "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers in a file whose lines are a name, a number, and an optional unit."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


SignalAction = Callable[[int, FrameType | None], object] | signal.Handlers


@contextmanager
def answered(action: SignalAction, *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals by `action` inside a `with` block. Only the main thread can; in another one this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, action) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
