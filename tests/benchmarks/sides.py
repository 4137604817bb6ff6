"""Every side of the comparison of remote steps, in turn, so that a machine whose speed drifts favours none of them.

raw                  the same bytes there and back over plain sockets, nothing computed: the limit
farstep, bf16        `optimizer.step()` over TCP: gradients there, a fused Adagrad step, parameters back into the model;
                     with `wire="bf16"`, float32 at both ends and half the bytes between
shared               the same over a unix socket, with gradients and parameters in shared memory where that is used
embedded             the same in this process, with nothing to move
RPC, default, uv     a parameter server of torch.distributed.rpc over each of its ways (`peers/torch_rpc.py`); RPC is
                     the way that is fastest on one machine
Ray                  a Ray actor, where Ray is installed (`peers/ray_actor.py`)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from tempfile import TemporaryDirectory

import torch

import farstep
from tests.benchmarks.peers import raw_sockets, ray_actor, torch_rpc
from tests.benchmarks.peers.torch_rpc import Size, Way
from tests.support.service.servers import RunningServer, running_server

RPC: dict[str, Way] = {"RPC": "basic", "default": "default", "uv": "uv"}
OURS = ("farstep", "bf16", "shared", "embedded")
SIDES = ("raw", *OURS, *RPC, "Ray")


@dataclass(frozen=True, slots=True)
class Work:
    """State a model, and how many timed steps of it are enough."""

    size: Size
    rounds: int

    @property
    def label(self) -> str:
        """Return what it is called in a table."""
        return f"{self.size.parameters:,} in {self.size.tensors}"


@dataclass(slots=True)
class Found:
    """Hold what was measured.

    Attributes:
        seconds: of each timed step, by side and work; a side that is not installed has none.
        reports: of the last step over TCP of each work.
    """

    seconds: dict[tuple[str, Work], list[float]] = field(default_factory=dict)
    reports: dict[Work, farstep.StepReport] = field(default_factory=dict)

    def add(self, side: str, work: Work, seconds: Sequence[float]) -> None:
        """Take in more steps of a side."""
        self.seconds.setdefault((side, work), []).extend(seconds)

    def has(self, side: str, work: Work) -> bool:
        """Return whether there is anything of a side."""
        return (side, work) in self.seconds

    def ms(self, side: str, work: Work) -> float:
        """Return the median of a side in milliseconds."""
        return 1e3 * median(self.seconds[side, work])


def take_turns(works: Sequence[Work], cycles: int) -> Found:
    """Measure all sides, one after the other, `cycles` times."""
    found = Found()
    sizes, rounds = [work.size for work in works], [work.rounds for work in works]
    with TemporaryDirectory() as directory, running_server("--unix", f"{directory}/s") as server:
        for _ in range(cycles):
            for work in works:
                _ours_and_the_limit(found, server, work)
            peers = {side: torch_rpc.measure_all(sizes, rounds, way) for side, way in RPC.items()}
            if ray_actor.installed():
                peers["Ray"] = ray_actor.measure_all(sizes, rounds)
            for side, times in peers.items():
                for work, seconds in zip(works, times, strict=True):
                    found.add(side, work, seconds)
    return found


def _ours_and_the_limit(found: Found, server: RunningServer, work: Work) -> None:
    found.add("raw", work, raw_sockets.measure_all([4 * work.size.parameters], work.rounds)[0])
    seconds, found.reports[work] = remote_steps(server.url, work)
    found.add("farstep", work, seconds)
    found.add("bf16", work, remote_steps(server.url, work, "bf16")[0])
    found.add("shared", work, remote_steps(server.unix, work)[0])
    found.add("embedded", work, remote_steps(None, work)[0])


def remote_steps(url: str | None, work: Work, wire: str | None = None) -> tuple[list[float], farstep.StepReport]:
    """Return the seconds of timed steps against a server, and the report of the last one."""
    optimizer = farstep.optim.Adagrad(parameters_of(work.size), server=url, kernel="fused", wire=wire)
    try:
        for _ in range(max(2, work.rounds // 5)):
            optimizer.step()
        seconds = []
        for _ in range(work.rounds):
            began = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        assert optimizer.last_step is not None
        return seconds, optimizer.last_step
    finally:
        optimizer.close()


def parameters_of(size: Size) -> list[torch.nn.Parameter]:
    """Return parameters with gradients, equal ones at each call."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(length, generator=generator)) for length in size.lengths]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters
