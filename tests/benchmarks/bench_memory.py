"""The server's memory with several workers in flight, against what there has to be.

    make bench        or        python tests/benchmarks/bench_memory.py [--workers 4]

One session of 25 M float32 parameters in 56 tensors (100 MB), Adagrad; the workers push without pause, so that each of
them has a push in flight or an answer on its way. Printed is the peak of the server's resident memory (`VmHWM`) beyond
that of the same server with a session of 1,000 parameters that has run the same kernel, against

    parameters, twice    one version that answers hold while the next one is made
    state                Adagrad's `sum`
    staging              one buffer for each push in flight

Target: at most 10 % more. Peaks are of a fresh server for each mode.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.crowd import Task, crowd
from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, within
from tests.support.service.servers import running_server

PARAMETERS, TENSORS = 25_000_000, 56
STEPS = 10
ALLOWED = 1.1


def memory_of(pid: int, key: str) -> int:
    """Return a line of a process's status in bytes: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of 4 workers, async and sync."""
    rows = []
    for sync in (False,) if quick else (False, True):
        peak, _ = peak_of(4, sync=sync, steps=3 if quick else STEPS)
        work = f"server memory, 4 {'sync' if sync else 'async'} workers, {PARAMETERS:,}"
        against = "2 x parameters + state + 4 x staging"
        rows.append(within(work, peak / 1e6, "MB", against, expected_bytes(4) / 1e6, ALLOWED))
    return rows


def expected_bytes(workers: int) -> int:
    """Return what there has to be: parameters twice, state, and a staging buffer for each push."""
    return (2 + 1 + workers) * 4 * PARAMETERS


def peak_of(workers: int, *, sync: bool, parameters: int = PARAMETERS, steps: int = STEPS) -> tuple[int, int]:
    """Return the bytes that a server takes at most for a session, and those that it takes at the end."""
    with running_server() as server:
        for task in (
            Task(server.url, "small", 1, False, 1_000, 4, 2),
            Task(server.url, "large", workers, sync, parameters, TENSORS, steps),
        ):
            base = memory_of(server.pid, "VmRSS")
            with crowd(task) as ready:
                ready.go()
        return memory_of(server.pid, "VmHWM") - base, memory_of(server.pid, "VmRSS") - base


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="how many push at the same time")
    workers = parser.parse_args(arguments).workers
    print(f"{hardware()}; load {os.getloadavg()[0]:.1f} before")
    one = 4 * PARAMETERS
    expected = expected_bytes(workers)
    print(f"{workers} workers: parameters {2 * one / 1e6:.0f} MB (x 2), state {one / 1e6:.0f}, staging {workers} x 100")
    print(f"{'mode':>6} {'expected MB':>12} {'peak MB':>9} {'to expected':>12} {'at the end':>11}  target")
    for sync in (False, True):
        peak, after = peak_of(workers, sync=sync)
        label = f"{'sync' if sync else 'async':>6} {expected / 1e6:>12.0f} {peak / 1e6:>9.0f}"
        print(f"{label} {peak / expected:>11.2f}x {after / 1e6:>11.0f}  at most {ALLOWED:.2f} x")


if __name__ == "__main__":
    main()
