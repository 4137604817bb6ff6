"""What the machine and its containers let a process have, and what a request is told that found no memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from farstep.errors import OutOfMemory
from farstep_service.machine import available_bytes, out_of_memory, usable_bytes
from tests.support.service.raw import RawClient
from tests.support.service.servers import RunningServer, running_server

MIB = 2**20
GIB = 2**30
UNLIMITED = 9223372036854771712
"""What version 1 says where there is no limit."""


class Machine:
    """The files of a machine of 8 GiB.

    Args:
        root: where they go.
        membership: what `/proc/self/cgroup` says.
    """

    def __init__(self, root: Path, membership: str) -> None:
        self.meminfo, self.cgroup, self.membership = root / "meminfo", root / "fs", root / "self"
        self.meminfo.write_text(f"MemTotal: {8 * GIB // 1024} kB\nMemAvailable: {6 * GIB // 1024} kB\n")
        self.membership.write_text(membership)
        self.cgroup.mkdir()

    def group(self, path: str, **numbers: int | str) -> None:
        """Add a control group of version 2 (`max`, `current`) or version 1 (`limit_in_bytes`, `usage_in_bytes`)."""
        directory = self.cgroup / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, number in numbers.items():
            stat = name in ("inactive_file", "total_inactive_file", "hierarchical_memory_limit")
            file = directory / ("memory.stat" if stat else f"memory.{name}")
            file.write_text(f"{name} {number}\n" if stat else f"{number}\n")

    @property
    def usable(self) -> int | None:
        return usable_bytes(meminfo=self.meminfo, cgroup=self.cgroup, membership=self.membership)

    @property
    def available(self) -> int | None:
        return available_bytes(meminfo=self.meminfo, cgroup=self.cgroup, membership=self.membership)


def test_the_lowest_limit_of_nested_containers_holds(tmp_path: Path) -> None:
    """A group without a limit of its own is bound by those around it, and each has what its limit leaves."""
    machine = Machine(tmp_path, "0::/kubepods/pod/box\n")
    machine.group("kubepods", max=4 * GIB, current=3 * GIB + GIB // 2)
    machine.group("kubepods/pod", max=700 * MIB, current=100 * MIB, inactive_file=50 * MIB)
    machine.group("kubepods/pod/box", max="max", current=100 * MIB)
    assert machine.usable == 700 * MIB
    assert machine.available == GIB // 2
    machine.group("kubepods/pod/box", max=200 * MIB, current=150 * MIB)
    assert (machine.usable, machine.available) == (200 * MIB, 50 * MIB)


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    """Where the path of the process leads nowhere, as in a container without a namespace, the mount is its group."""
    machine = Machine(tmp_path, "0::/docker/0123\n")
    machine.group("", max=700 * MIB, current=200 * MIB)
    assert (machine.usable, machine.available) == (700 * MIB, 500 * MIB)


def test_version_1_counts_too(tmp_path: Path) -> None:
    """So does the hierarchy's own word for the lowest limit, which may be that of a group nobody here sees."""
    machine = Machine(tmp_path, "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n")
    machine.group("memory", limit_in_bytes=UNLIMITED, usage_in_bytes=GIB)
    machine.group("memory/a", limit_in_bytes=GIB, usage_in_bytes=GIB // 2, total_inactive_file=GIB // 4)
    machine.group("memory/a/b", limit_in_bytes=UNLIMITED, usage_in_bytes=GIB // 2)
    assert (machine.usable, machine.available) == (GIB, 3 * GIB // 4)
    machine.group("memory/a/b", hierarchical_memory_limit=600 * MIB)
    assert machine.usable == 600 * MIB


def test_without_a_limit_the_machine_is_what_there_is(tmp_path: Path) -> None:
    """No control groups, none of this process, or such without a limit: the machine's memory."""
    machine = Machine(tmp_path, "")
    assert (machine.usable, machine.available) == (8 * GIB, 6 * GIB)
    machine.group("", max="max", current=GIB)
    machine.group("other", max=1, current=0)
    assert (machine.usable, machine.available) == (8 * GIB, 6 * GIB)
    machine.meminfo.unlink()
    (machine.cgroup / "memory.max").unlink()
    assert machine.available is None


@pytest.mark.parametrize(
    ("exc", "asked"),
    [
        (MemoryError(), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes. Error"), 4000),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), 5 * GIB // 2),
        (RuntimeError("CUDA error: out of memory"), None),
    ],
)
def test_each_way_of_finding_no_memory_is_told(exc: Exception, asked: int | None) -> None:
    """Python's error and torch's, on the CPU and on a GPU, become one that says what was asked and what there is."""
    error = out_of_memory(exc, "The request")
    assert isinstance(error, OutOfMemory)
    assert error.extra.get("asked") == asked
    assert error.extra["available"] == pytest.approx(available_bytes(), rel=0.5)
    assert asked is None or str(asked) in error.detail


@pytest.mark.parametrize("exc", [ValueError("out of memory"), RuntimeError("size mismatch"), KeyError("memory")])
def test_other_errors_are_not_taken_for_it(exc: Exception) -> None:
    """An error that merely speaks of memory is none of these."""
    assert out_of_memory(exc, "The request") is None


@pytest.mark.promise("A server without memory for a request says so, changes nothing, and goes on.", area="memory")
def test_a_server_that_gets_no_memory_says_so_and_goes_on() -> None:
    """Contents and pushes for which the system gives none are 503 `out_of_memory`; the sessions stay as they were."""
    large = [torch.zeros(64 * MIB // 4)]
    with running_server() as server, RawClient(server.url) as raw:
        (small,) = raw.begun("small", parameters=(torch.zeros(1000),))
        worker = raw.join("large", parameters=large)
        with _limited(server, spare=40 * MIB):
            refused = worker.begin(large)
            assert (refused.status, refused.code) == (503, "out_of_memory"), refused.body
            assert refused.document["asked"] == 64 * MIB
            assert refused.document["available"] > 0
            assert small.push([torch.ones(1000)]).receipt["version"] == 1
        assert worker.begin(large).status == 200
        assert worker.push(large).receipt["version"] == 1
        before = worker.pull()
        with _limited(server, spare=40 * MIB):
            refused = worker.push([torch.ones(64 * MIB // 4)])
            assert (refused.status, refused.code) == (503, "out_of_memory"), refused.body
            assert small.push([torch.ones(1000)]).receipt["version"] == 2
        version, (now,) = worker.pull()
        assert (version, bool((now == before[1][0]).all())) == (1, True)
        assert worker.push([torch.ones(64 * MIB // 4)]).receipt["version"] == 2
        assert "Traceback" not in server.log


class _limited:
    """Leave a server's process only so much address space beyond what it has."""

    def __init__(self, server: RunningServer, spare: int) -> None:
        self._server, self._spare = server, spare

    def __enter__(self) -> None:
        pages = int(Path(f"/proc/{self._server.pid}/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + self._spare
        self._before = resource.prlimit(self._server.pid, resource.RLIMIT_AS)
        resource.prlimit(self._server.pid, resource.RLIMIT_AS, (most, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.prlimit(self._server.pid, resource.RLIMIT_AS, self._before)
