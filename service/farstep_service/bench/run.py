"""Measure a link and a device with steps of a model, and of other sizes for the lines between them.

    memory on both sides? ── yes ──► round trips ──► sizes, ascending: open a session, warm up, take steps, remove it
          │ no
          ▼
    refused, nothing was taken

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
from farstep_service.bench.steps import Steps, await_fused, measure, opened
from farstep_service.bench.workload import Workload
from farstep_service.machine import answered, available_bytes
from farstep_service.settings import is_loopback

REQUESTS = 200
REQUESTS_WITHIN_S = 3.0
FEWEST_REQUESTS = 10
LARGE_BYTES = 4_000_000
"""The largest size is at least this, so that bytes count in it."""
APART = 8
"""How many times the largest size is the one between."""
OWN_SHARE = 0.6
"""What part of the seconds the model itself gets; the other sizes have the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Say what to measure.

    Attributes:
        workload: the model.
        steps: how many steps of each size; None for as many as fit into the time.
        seconds: how long the steps of all sizes may take together.
        wait_s: how long to wait for a fused kernel.
    """

    workload: Workload
    steps: int | None
    seconds: float
    wait_s: float


def run(
    asked: Asked, speaking: Conversation | None, token: str | None, info: dict[str, Any], tell: Callable[[str], None]
) -> Expectation:
    """Measure and return what to expect. No session is left, also when it is interrupted.

    Args:
        asked: what to measure.
        speaking: a conversation with the server; None for a session in this process.
        token: the server's token.
        info: what the server says about itself; {} without one.
        tell: called with what is being done, for a person who waits.

    Raises:
        InvalidOption: there is too little memory here.
        LimitExceeded: there is too little on the server, or it allows less.
        FarstepError: what else the server refused.
        KeyboardInterrupt: on SIGINT or SIGTERM.
    """
    sizes = sizes_of(asked.workload)
    check_memory(max(sizes, key=lambda each: each.nbytes), None if speaking is None else speaking.server, info)
    with interruptible():
        trip = None if speaking is None else round_trips(speaking)
        measured: list[Steps] = []
        for place, size in enumerate(sizes):
            share = OWN_SHARE if size is asked.workload else (1 - OWN_SHARE) / (len(sizes) - 1)
            with opened(size, speaking, token) as optimizer:
                if not place and size.fuses:
                    await_fused(optimizer, asked.wait_s, tell)
                tell(f"measuring steps of {size.parameters:,} parameters")
                measured.append(measure(size, optimizer, steps=asked.steps, seconds=share * asked.seconds))
    return Expectation(
        None if speaking is None else speaking.server,
        str(info.get("device", "cpu")),
        trip,
        next(each for each in measured if each.workload is asked.workload),
        measured,
    )


def sizes_of(workload: Workload) -> list[Workload]:
    """Return a workload and others of as many tensors, ascending: one of next to no bytes, and one or two large."""
    own = workload.parameters
    large = own if 2 * workload.nbytes >= LARGE_BYTES else LARGE_BYTES // workload.itemsize
    others = [
        count
        for count in (min(len(workload.shapes), large), large // APART, large)
        if count > 2 * own or 2 * count < own
    ]
    return sorted([workload, *map(workload.scaled, others)], key=lambda each: each.nbytes)


def check_memory(workload: Workload, server: str | None, info: dict[str, Any]) -> None:
    """Refuse a workload for which there is too little memory, before any is taken.

    Args:
        workload: the largest that will be measured.
        server: its URL, None for a session in this process.
        info: what it says about itself.
    """
    here, there = 2 * workload.nbytes, 3 * workload.nbytes + workload.state_bytes
    who = "this process"
    if server is None:
        here += workload.state_bytes
    else:
        here += workload.nbytes  # where parameters arrive
        if is_loopback(urlsplit(server).hostname or "localhost") and info.get("device") == "cpu":
            who, here = "this process and the server", here + there
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
            f"Measuring {workload.parameters:,} {workload.dtype} parameters takes about {_gb(here)} in {who}, "
            f"and {_gb(free)} are available.",
            remedy="Ask for fewer parameters: the other sizes are estimated.",
            field="parameters",
            limit=free,
        )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3g} GB" if nbytes < 1e12 else f"{nbytes / 1e9:,.0f} GB"


def round_trips(speaking: Conversation) -> RoundTrip:
    """Return what empty requests over one connection take."""
    seconds: list[float] = []
    speaking.control("GET", "/healthz")  # opens the connection
    until = time.monotonic() + REQUESTS_WITHIN_S
    while len(seconds) < FEWEST_REQUESTS or (len(seconds) < REQUESTS and time.monotonic() < until):
        began = time.perf_counter()
        speaking.control("GET", "/healthz")
        seconds.append(time.perf_counter() - began)
    return RoundTrip(median(seconds), quantiles(seconds, n=100, method="inclusive")[-1], len(seconds))


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt, and let nothing interrupt the clean-up after it."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        for each in interrupting:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    interrupting = (signal.SIGINT, signal.SIGTERM)
    with answered(stop, *interrupting):
        yield
