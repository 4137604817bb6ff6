"""A worker in a process of its own, which steps until it is killed and says after each step what became of it.

    python -m tests.client.training_process URL SESSION WORKER '{"mode": "sync", "workers": 2}' [NUMBER]

The gradients of its steps are 1 in one element after the other of its own SLOTS, those of that number, and 0 elsewhere,
so that the parameters count what was applied. Each line is JSON: slot, version, contributors, divisor, reason and
staleness of a step, or the code of an error. A line on standard input ends it.
"""

from __future__ import annotations

import itertools
import json
import select
import sys

import torch

from farstep.consistency import from_options
from farstep.errors import BarrierTimeout
from farstep.optim import SGD

WORKERS = 4
SLOTS = 64


def main(server: str, session: str, worker: str, mode: str, number: str = "0") -> None:
    parameter = torch.nn.Parameter(torch.zeros(WORKERS * SLOTS))
    slots = itertools.cycle(range(int(number) * SLOTS, (int(number) + 1) * SLOTS))
    optimizer = SGD(
        [parameter],
        lr=1.0,
        server=server,
        session=session,
        worker=worker,
        kernel="reference",
        consistency=from_options(json.loads(mode)),
    )
    say({"joined": worker})
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        slot = next(slots)
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[slot] = 1.0
        try:
            optimizer.step()
        except BarrierTimeout as error:
            say({"error": error.code})
            continue
        report = optimizer.last_step
        assert report is not None
        say(
            {
                "slot": slot,
                "version": report.version,
                "contributors": report.contributors,
                "divisor": report.divisor,
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
