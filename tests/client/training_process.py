"""A worker in a process of its own, which steps until it is killed and says after each step what became of it.

    processes = get_context("forkserver")
    processes.set_forkserver_preload([training_process.__name__])       # torch is imported once for all of them
    processes.Process(target=train, args=(said, url, session, worker, mode)).start()

Each line is JSON: version, contributors, reason and staleness of a step, or the code of an error.
"""

from __future__ import annotations

import json
import os
from multiprocessing import parent_process
from multiprocessing.connection import Connection

import torch
import torch._dynamo  # which torch imports with the first optimizer, and takes a second for

from farstep.consistency import Consistency
from farstep.errors import BarrierTimeout
from farstep.optim import SGD


def train(said: Connection, server: str, session: str, worker: str, mode: Consistency) -> None:
    """Join and step, for as long as the test runs.

    Args:
        said: takes the lines.
        server, session, worker, mode: where to, as whom, and how.
    """
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None
    parameter = torch.nn.Parameter(torch.zeros(16))
    optimizer = SGD(
        [parameter], lr=0.1, server=server, session=session, worker=worker, kernel="reference", consistency=mode
    )
    say(said, {"joined": worker})
    while parent.is_alive():
        parameter.grad = torch.ones(16)
        try:
            optimizer.step()
        except BarrierTimeout as error:
            say(said, {"error": error.code})
            continue
        report = optimizer.last_step
        assert report is not None
        say(
            said,
            {
                "version": report.version,
                "contributors": report.contributors,
                "reason": report.reason,
                "staleness": report.staleness,
            },
        )
    optimizer.close()


def say(said: Connection, what: dict[str, object]) -> None:
    """Write a line at once."""
    os.write(said.fileno(), json.dumps(what).encode() + b"\n")
