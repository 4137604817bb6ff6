"""A worker in a process of its own, which steps until it is killed and says after each step what became of it.

    python -m tests.client.training_process URL SESSION WORKER '{"mode": "sync", "workers": 2}' [OPTIMIZER]

Each line is JSON: version, contributors, reason and staleness of a step, or the code of an error. A line on standard
input ends it.
"""

from __future__ import annotations

import json
import select
import sys

import torch

from farstep.consistency import from_options
from farstep.errors import BarrierTimeout
from farstep.optim import SGD


def main(server: str, session: str, worker: str, mode: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(16))
    optimizer = SGD(
        [parameter],
        lr=0.1,
        server=server,
        session=session,
        worker=worker,
        kernel="reference",
        consistency=from_options(json.loads(mode)),
    )
    say({"joined": worker})
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        parameter.grad = torch.ones(16)
        try:
            optimizer.step()
        except BarrierTimeout as error:
            say({"error": error.code})
            continue
        report = optimizer.last_step
        assert report is not None
        say(
            {
                "version": report.version,
                "contributors": report.contributors,
                "reason": report.reason,
                "staleness": report.staleness,
            }
        )
    optimizer.close()


def say(what: dict[str, object]) -> None:
    """Print a line at once."""
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
