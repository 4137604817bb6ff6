"""Real steps in a session of their own, and where the time of each went.

    up       gradients there, as the server receives them
    queue    waiting for the session's turn
    check    looking for NaN and Inf
    update   the kernel
    down     parameters back, as they arrive here
    copy     from where they arrived into the model
    client   around the exchange: groups, edits, hooks
    other    what is left: the first byte's way there and back, heads of requests, threads

The parts of a step add up to it. The session is removed at the end, whatever happens.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import mean, median, quantiles

import httpx
import torch

import farstep
from farstep.conversation import Conversation
from farstep.errors import FarstepError
from farstep.optim.base import RemoteOptimizer
from farstep.protocol.memory import TORCH_DTYPES
from farstep.protocol.receipt import StepReport
from farstep.settings import RemoteOptions
from farstep_service.bench.workload import Workload

PARTS = ("up", "queue", "check", "update", "down", "copy", "client", "other")
WARM_UP = 3
FEWEST = 5
MOST = 5_000
REMOVE_WITHIN_S = 5.0
LOOK_AGAIN_S = 0.05

_ON_THE_SERVER = {
    "up": "receive",
    "queue": "queue",
    "check": "check",
    "update": "kernel",
    "down": "send",
    "copy": "copy",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """State what one step took, in seconds, and its parts."""

    total_s: float
    parts_s: dict[str, float]

    @classmethod
    def of(cls, total_s: float, report: StepReport) -> Sample:
        """Divide the seconds of a step by what its report says; the last part is what it does not explain."""
        parts = {part: report.seconds.get(name, 0.0) for part, name in _ON_THE_SERVER.items()}
        parts["client"] = total_s - report.seconds["total"]
        parts["other"] = total_s - sum(parts.values())
        return cls(total_s, parts)


@dataclass(frozen=True)
class Steps:
    """Hold the steps that were measured with one workload, and the report of the last one."""

    workload: Workload
    samples: Sequence[Sample]
    report: StepReport

    @property
    def median_s(self) -> float:
        """Return the median of the steps."""
        return median(each.total_s for each in self.samples)

    @property
    def p90_s(self) -> float:
        """Return what nine of ten steps do not exceed."""
        return quantiles([each.total_s for each in self.samples], n=10, method="inclusive")[-1]

    def usual(self) -> Sample:
        """Return the mean of the steps in the middle: those between the first quarter and the last by their time.

        Medians of parts would not add up to the median of the whole; means do, and these leave out the odd ones.
        """
        ordered = sorted(self.samples, key=lambda each: each.total_s)
        aside = len(ordered) // 4
        middle = ordered[aside : len(ordered) - aside]
        return Sample(
            mean(each.total_s for each in middle),
            {part: mean(each.parts_s[part] for each in middle) for part in PARTS},
        )


@contextmanager
def opened(
    workload: Workload,
    speaking: Conversation | None,
    token: str | None,
    transport: httpx.BaseTransport | None = None,
) -> Iterator[RemoteOptimizer]:
    """Open a session of a workload, with gradients; remove it at the end of the block.

    Args:
        workload: what is in it.
        speaking: a conversation with the server; None for a session in this process.
        token: the server's token.
        transport: carries the steps.
    """
    name = f"bench-{secrets.token_hex(8)}"
    generator = torch.Generator().manual_seed(0)
    dtype = TORCH_DTYPES[workload.dtype]
    parameters = []
    for shape in workload.shapes:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device="cpu"))
        parameter.grad = torch.empty(shape, dtype=dtype, device="cpu").normal_(generator=generator)
        parameters.append(parameter)
    place: RemoteOptions = {
        "server": None if speaking is None else speaking.server,
        "session": name,
        "worker": "bench",
        "token": token,
        "transport": transport,
    }
    optimizer: RemoteOptimizer | None = None
    try:
        optimizer = getattr(farstep.optim, workload.optimizer)(parameters, **place)
        yield optimizer
    finally:
        if optimizer is not None:
            optimizer.close()
        if speaking is not None:  # by its name, so that one is found whose creation was interrupted
            with suppress(FarstepError, httpx.HTTPError, OSError):
                speaking.control("DELETE", f"/v1/sessions/{name}", within_s=REMOVE_WITHIN_S)


def await_fused(optimizer: RemoteOptimizer, within_s: float, tell: Callable[[str], None]) -> None:
    """Take steps until a fused kernel runs them or the time is up."""
    until = time.monotonic() + within_s
    optimizer.step()
    if optimizer.last_step and optimizer.last_step.kernel != "fused":
        tell(f"waiting for the fused kernel, at most {within_s:g} s")
    while optimizer.last_step and optimizer.last_step.kernel != "fused" and time.monotonic() < until:
        time.sleep(LOOK_AGAIN_S)  # it is being built, with the cores that steps would take
        optimizer.step()


def measure(workload: Workload, optimizer: RemoteOptimizer, *, steps: int | None, seconds: float) -> Steps:
    """Take steps and return what they took.

    Args:
        workload: what the optimizer has.
        optimizer: takes the steps.
        steps: how many; None for as many as fit, within limits, into the seconds.
        seconds: how long to go on.
    """
    for _ in range(WARM_UP):
        optimizer.step()
    samples: list[Sample] = []
    until = time.monotonic() + seconds
    while len(samples) < (steps or FEWEST) or (not steps and len(samples) < MOST and time.monotonic() < until):
        began = time.perf_counter()
        optimizer.step()
        total_s = time.perf_counter() - began
        assert optimizer.last_step is not None
        samples.append(Sample.of(total_s, optimizer.last_step))
    assert optimizer.last_step is not None
    return Steps(workload, samples, optimizer.last_step)
