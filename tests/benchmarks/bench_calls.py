"""How many calls of Python one remote step takes, on each side: what a small step costs beside the network.

    make bench        or        python tests/benchmarks/bench_calls.py [--lines]

One Adagrad step of two small tensors over TCP, async, with the reference kernel. Counted are calls of functions that
are written in Python, in any package: torch's own `Optimizer.step` takes some forty of the worker's. The server is
a process of its own, whose main thread counts between two signals.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import farstep
from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, fact

STEPS = 50
WARM_UP = 20
WITHIN_S = 30.0
TARGETS = {"worker": 110, "server": 140}

Counted = Counter[str]
"""Calls by the place of the function."""

COUNTING = """
import json, os, signal, sys
from collections import Counter

counted = Counter()

def note(frame, event, _):
    if event == "call":
        counted[f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno} {frame.f_code.co_name}"] += 1

def turn(*_):
    if sys.getprofile() is None:
        counted.clear()
        sys.setprofile(note)
        return
    sys.setprofile(None)
    with open(PATH + ".part", "w") as file:
        json.dump(counted, file)
    os.rename(PATH + ".part", PATH)

signal.signal(signal.SIGUSR2, turn)
from farstep_service.cli import main
sys.argv[0] = "farstep"
main()
"""
"""A server that counts its calls from one signal to the next, and then writes them down."""


def measure(*, quick: bool) -> Sequence[Row]:
    """Return a row for each side."""
    steps = STEPS // 5 if quick else STEPS
    found = zip(TARGETS, counted_calls(steps), strict=True)
    rows = []
    for side, calls in found:
        count, most = sum(calls.values()) / steps, TARGETS[side]
        work = f"one remote step of two tensors, {side}"
        rows.append(fact(work, count, "calls", "Python functions", f"at most {most}", round(count) <= most))
    return rows


def counted_calls(steps: int) -> tuple[Counted, Counted]:
    """Return the calls of a worker, and of its server, in so many steps."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "calls.json")
        with counting_server(path) as (process, url):
            parameters = [torch.nn.Parameter(torch.zeros(50, 40)), torch.nn.Parameter(torch.zeros(500))]
            optimizer = farstep.optim.Adagrad(parameters, lr=0.1, server=url, kernel="reference")
            for each in parameters:
                each.grad = torch.ones_like(each)
            for _ in range(WARM_UP):
                optimizer.step()
            process.send_signal(signal.SIGUSR2)
            optimizer.step()  # after whose answer the server counts for certain, or has begun within it
            worker: Counted = Counter()

            def note(frame: FrameType, event: str, _: object) -> None:
                if event == "call":
                    worker[f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno} {frame.f_code.co_name}"] += 1

            sys.setprofile(note)
            for _ in range(steps):
                optimizer.step()
            sys.setprofile(None)
            process.send_signal(signal.SIGUSR2)
            optimizer.step()
            server: Counted = Counter(json.loads(_written(path)))
            extra = server.copy()
            for place, count in extra.items():  # of the step with which counting began, and parts of its neighbours
                server[place] = round(count * steps / (steps + 1))
            optimizer.close()
            return worker, server


@contextmanager
def counting_server(path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server that writes its calls to a file; yield its process and its URL."""
    program = f"PATH = {str(path)!r}\n{COUNTING}"
    command = [sys.executable, "-c", program, "serve", "--json", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, str(json.loads(process.stdout.readline())["url"])
        finally:
            process.terminate()


def _written(path: Path) -> str:
    """Return what the server wrote, when it is there.

    Raises:
        TimeoutError: it is not.
    """
    until = time.monotonic() + WITHIN_S
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"the server wrote no {path.name}")
        os.sched_yield()
    return path.read_text()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", action="store_true", help="name the functions, too")
    lines = parser.parse_args(arguments).lines
    print(hardware())
    for side, calls in zip(TARGETS, counted_calls(STEPS), strict=True):
        print(f"{side}: {sum(calls.values()) / STEPS:.0f} calls a step, at most {TARGETS[side]} wanted")
        for place, count in calls.most_common() if lines else ():
            print(f"{count / STEPS:10.2f}  {place}")


if __name__ == "__main__":
    main()
