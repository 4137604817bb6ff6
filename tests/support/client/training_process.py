"""A worker in a process of its own, which steps until it is killed and says after each step what became of it.

    processes = get_context("forkserver")
    processes.set_forkserver_preload([training_process.__name__])       # torch is imported once for all of them
    processes.Process(target=train, args=(pipe, url, session, worker, mode, number)).start()

The gradients of its steps are 1 in one element after the other of its own SLOTS, those of that number, and 0 elsewhere,
so that the parameters count what was applied. Each line is JSON: slot, version, contributors, divisor, reason and
staleness of a step, or the code of an error. A line from the other side ends it.
"""

from __future__ import annotations

import itertools
import json
import os
from multiprocessing import parent_process
from multiprocessing.connection import Connection

import torch
import torch._dynamo  # which torch imports with the first optimizer, and takes a second for

from farstep.errors import BarrierTimeout
from farstep.optim import SGD
from farstep.protocol.consistency import Consistency
from farstep.settings import RemoteOptions

WORKERS = 4
SLOTS = 64


def train(
    pipe: Connection,
    server: str,
    session: str,
    worker: str,
    mode: Consistency,
    number: int,
    remote: RemoteOptions | None = None,
) -> None:
    """Join and step, until a line comes or the test has ended.

    Args:
        pipe: takes the lines.
        server, session, worker, mode: where to, as whom, and how.
        number: whose slots are its own.
        remote: further options of the optimizer.
    """
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None
    parameter = torch.nn.Parameter(torch.zeros(WORKERS * SLOTS))
    slots = itertools.cycle(range(number * SLOTS, (number + 1) * SLOTS))
    place: RemoteOptions = {"server": server, "session": session, "worker": worker, "kernel": "reference"}
    place |= {"consistency": mode, **(remote or {})}
    optimizer = SGD([parameter], lr=1.0, **place)
    say(pipe, {"joined": worker})
    while parent.is_alive() and not pipe.poll():
        slot = next(slots)
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[slot] = 1.0
        try:
            optimizer.step()
        except BarrierTimeout as error:
            say(pipe, {"error": error.code})
            continue
        report = optimizer.last_step
        assert report is not None
        say(
            pipe,
            {
                "slot": slot,
                "version": report.version,
                "contributors": report.contributors,
                "divisor": report.divisor,
                "reason": report.reason,
                "staleness": report.staleness,
            },
        )
    optimizer.close()
    if pipe.poll():
        os.read(pipe.fileno(), 1)  # a line that is not read would cut the others short


def say(pipe: Connection, what: dict[str, object]) -> None:
    """Write a line at once."""
    os.write(pipe.fileno(), json.dumps(what).encode() + b"\n")
