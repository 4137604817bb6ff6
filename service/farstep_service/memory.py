"""How much memory a device could still give, as the machine or the container says."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: str = "cpu", *, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Return the bytes that could be taken on a device now, None where nobody says.

    On the CPU that is what the kernel calls available, or less where the process is in a container with a limit; pages
    of files that could be dropped count as available in both.

    Args:
        device: a torch device.
        meminfo, cgroup: where Linux says it.
    """
    if not device.startswith("cpu"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0]) if device.startswith("cuda") else None
    found = [each for each in (_of_machine(meminfo), _of_container(cgroup)) if each is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    kib = _numbers(meminfo).get("MemAvailable:")
    return None if kib is None else kib * 1024


def _of_container(cgroup: Path) -> int | None:
    try:
        limit, used = int((cgroup / "memory.max").read_text()), int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no such files, or no limit: "max"
        return None
    return max(0, limit - used + _numbers(cgroup / "memory.stat").get("inactive_file", 0))


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers of a file whose lines are a name, a number, and perhaps a unit."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
