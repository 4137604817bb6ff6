"""Measure a link and a device with steps of a model, and with steps of other sizes for the estimates.

    memory on both sides? ── yes ──► round trips ──► sizes, ascending: open a session, warm up, take steps, remove it
          │ no
          ▼
    refused, before any is taken

The smallest session waits for the fused kernel, which is the same for all sizes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from farstep.conversation import Conversation
from farstep.errors import LimitExceeded, invalid_option
from farstep_service.bench.expectation import Expectation, RoundTrip
from farstep_service.bench.steps import Steps, measure, open_session, wait_for_fused
from farstep_service.bench.workload import Workload
from farstep_service.machine import answered, available_bytes
from farstep_service.settings import is_loopback

REQUESTS = 200
REQUESTS_MAX_S = 3.0
MIN_REQUESTS = 10
LARGE_BYTES = 4_000_000
"""The largest size is at least this, so that its bytes matter."""
SPREAD = 8
"""How many times larger the largest size is than the middle one."""
MODEL_SHARE = 0.6
"""The share of the seconds for the model itself; the other sizes get the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Choose what to measure.

    Attributes:
        workload: the model.
        steps: how many steps of each size; None for as many as fit into the seconds.
        seconds: how long the steps of all sizes may take together.
        wait_s: how long to wait for a fused kernel.
    """

    workload: Workload
    steps: int | None
    seconds: float
    wait_s: float


def run(
    options: BenchOptions,
    conversation: Conversation | None,
    token: str | None,
    info: dict[str, Any],
    progress: Callable[[str], None],
) -> Expectation:
    """Measure, and return the result. No session is left, even if the run is interrupted.

    Args:
        options: what to measure.
        conversation: a conversation with the server; None for a session in this process.
        token: the server's token.
        info: the server's `/v1/info`; {} without a server.
        progress: called with a description of each stage.

    Raises:
        InvalidOption: this machine has too little memory.
        LimitExceeded: the server has too little memory, or a lower limit.
        FarstepError: another refusal of the server.
        KeyboardInterrupt: on SIGINT or SIGTERM.
    """
    sizes = sizes_of(options.workload)
    check_memory(max(sizes, key=lambda each: each.nbytes), None if conversation is None else conversation.server, info)
    with interruptible():
        trip = None if conversation is None else round_trips(conversation)
        measured: list[Steps] = []
        for index, size in enumerate(sizes):
            share = MODEL_SHARE if size is options.workload else (1 - MODEL_SHARE) / (len(sizes) - 1)
            with open_session(size, conversation, token) as optimizer:
                if not index and size.fuses:
                    wait_for_fused(optimizer, options.wait_s, progress)
                progress(f"measuring steps of {size.parameters:,} parameters")
                measured.append(measure(size, optimizer, steps=options.steps, seconds=share * options.seconds))
    return Expectation(
        None if conversation is None else conversation.server,
        str(info.get("device", "cpu")),
        trip,
        next(each for each in measured if each.workload is options.workload),
        measured,
    )


def sizes_of(workload: Workload) -> list[Workload]:
    """Return a workload and others of as many tensors, ascending: one of next to no bytes, and one or two large."""
    own = workload.parameters
    large = own if 2 * workload.nbytes >= LARGE_BYTES else LARGE_BYTES // workload.itemsize
    others = [
        count
        for count in (min(len(workload.shapes), large), large // SPREAD, large)
        if count > 2 * own or 2 * count < own
    ]
    return sorted([workload, *map(workload.scaled, others)], key=lambda each: each.nbytes)


def check_memory(workload: Workload, server: str | None, info: dict[str, Any]) -> None:
    """Refuse a workload for which memory is too small, before any is taken.

    Args:
        workload: the largest to be measured.
        server: the server's URL; None for a session in this process.
        info: the server's `/v1/info`.
    """
    here, there = 2 * workload.nbytes, 3 * workload.nbytes + workload.state_bytes
    owner = "this process"
    if server is None:
        here += workload.state_bytes
    else:
        here += workload.nbytes  # where parameters arrive
        if is_loopback(urlsplit(server).hostname or "localhost") and info.get("device") == "cpu":
            owner, here = "this process and the server", here + there
        elif (room := info.get("available_bytes")) is not None and there > room:
            raise LimitExceeded(
                f"A session of {workload.parameters:,} {workload.dtype} parameters takes about {_gb(there)} on "
                f"{server}, and {_gb(room)} are available there.",
                remedy="Ask for fewer parameters, or a server with more memory.",
                field="parameters",
                limit=room,
            )
    free = available_bytes()
    if free is not None and here > free:
        raise invalid_option(
            f"Measuring {workload.parameters:,} {workload.dtype} parameters takes about {_gb(here)} in {owner}, "
            f"and {_gb(free)} are available.",
            remedy="Ask for fewer parameters: the other sizes are estimated.",
            field="parameters",
            limit=free,
        )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3g} GB" if nbytes < 1e12 else f"{nbytes / 1e9:,.0f} GB"


def round_trips(conversation: Conversation) -> RoundTrip:
    """Return the round-trip time of empty requests over one connection."""
    seconds: list[float] = []
    conversation.control("GET", "/healthz")  # opens the connection
    until = time.monotonic() + REQUESTS_MAX_S
    while len(seconds) < MIN_REQUESTS or (len(seconds) < REQUESTS and time.monotonic() < until):
        began = time.perf_counter()
        conversation.control("GET", "/healthz")
        seconds.append(time.perf_counter() - began)
    return RoundTrip(median(seconds), quantiles(seconds, n=100, method="inclusive")[-1], len(seconds))


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at the first SIGINT or SIGTERM; ignore others, which would interrupt the clean-up."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        for each in interrupting:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    interrupting = (signal.SIGINT, signal.SIGTERM)
    with answered(stop, *interrupting):
        yield
