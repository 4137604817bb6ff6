"""Real steps in a session of their own, and how the time of each divides.

    up       the server receives the gradients
    queue    the push waits for its turn
    check    the server looks for NaN and Inf
    update   the kernel runs
    down     parameters arrive here
    copy     they are copied into the model
    client   work around the exchange: groups, edits, hooks
    other    the rest: latency of the first byte, request headers, threads

The parts of a step add up to it. The session is removed at the end, even after an error.
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
MIN_STEPS = 5
MAX_STEPS = 5_000
REMOVE_WITHIN_S = 5.0
LOOK_AGAIN_S = 0.05

_REPORTED_AS = {
    "up": "receive",
    "queue": "queue",
    "check": "check",
    "update": "kernel",
    "down": "send",
    "copy": "copy",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Record the seconds of one step and of its parts."""

    total_s: float
    parts_s: dict[str, float]

    @classmethod
    def of(cls, total_s: float, report: StepReport) -> Sample:
        """Divide the seconds of a step into the parts of its report; the last part is the rest."""
        parts = {part: report.seconds.get(name, 0.0) for part, name in _REPORTED_AS.items()}
        parts["client"] = total_s - report.seconds["total"]
        parts["other"] = total_s - sum(parts.values())
        return cls(total_s, parts)


@dataclass(frozen=True)
class Steps:
    """Hold the measured steps of one workload, and the report of the last one."""

    workload: Workload
    samples: Sequence[Sample]
    report: StepReport

    @property
    def median_s(self) -> float:
        """Return the median of the steps."""
        return median(each.total_s for each in self.samples)

    @property
    def p90_s(self) -> float:
        """Return the 90th percentile of the steps."""
        return quantiles([each.total_s for each in self.samples], n=10, method="inclusive")[-1]

    def typical(self) -> Sample:
        """Return the mean of the middle half of the steps, ordered by their time.

        Medians of parts do not add up to the median of the whole; means do, and these leave out outliers.
        """
        ordered = sorted(self.samples, key=lambda each: each.total_s)
        aside = len(ordered) // 4
        middle = ordered[aside : len(ordered) - aside]
        return Sample(
            mean(each.total_s for each in middle),
            {part: mean(each.parts_s[part] for each in middle) for part in PARTS},
        )


@contextmanager
def open_session(
    workload: Workload,
    conversation: Conversation | None,
    token: str | None,
    transport: httpx.BaseTransport | None = None,
) -> Iterator[RemoteOptimizer]:
    """Open a session of a workload, with gradients; remove it at the end of the block.

    Args:
        workload: the session's parameters and optimizer.
        conversation: a conversation with the server; None for a session in this process.
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
    remote: RemoteOptions = {
        "server": None if conversation is None else conversation.server,
        "session": name,
        "worker": "bench",
        "token": token,
        "transport": transport,
    }
    optimizer: RemoteOptimizer | None = None
    try:
        optimizer = getattr(farstep.optim, workload.optimizer)(parameters, **remote)
        yield optimizer
    finally:
        if optimizer is not None:
            optimizer.close()
        if conversation is not None:  # by name: the creation may have been interrupted
            with suppress(FarstepError, httpx.HTTPError, OSError):
                conversation.control("DELETE", f"/v1/sessions/{name}", within_s=REMOVE_WITHIN_S)


def wait_for_fused(optimizer: RemoteOptimizer, within_s: float, progress: Callable[[str], None]) -> None:
    """Take steps until a fused kernel runs them, or the time is up."""
    until = time.monotonic() + within_s
    optimizer.step()
    if optimizer.last_step and optimizer.last_step.kernel != "fused":
        progress(f"waiting for the fused kernel, at most {within_s:g} s")
    while optimizer.last_step and optimizer.last_step.kernel != "fused" and time.monotonic() < until:
        time.sleep(LOOK_AGAIN_S)  # it is being built, with the cores that steps would take
        optimizer.step()


def measure(workload: Workload, optimizer: RemoteOptimizer, *, steps: int | None, seconds: float) -> Steps:
    """Take steps and return their times.

    Args:
        workload: the optimizer's parameters.
        optimizer: takes the steps.
        steps: how many; None for as many as fit, within limits, into the seconds.
        seconds: for how long.
    """
    for _ in range(WARM_UP):
        optimizer.step()
    samples: list[Sample] = []
    until = time.monotonic() + seconds
    while len(samples) < (steps or MIN_STEPS) or (not steps and len(samples) < MAX_STEPS and time.monotonic() < until):
        began = time.perf_counter()
        optimizer.step()
        total_s = time.perf_counter() - began
        assert optimizer.last_step is not None
        samples.append(Sample.of(total_s, optimizer.last_step))
    assert optimizer.last_step is not None
    return Steps(workload, samples, optimizer.last_step)
