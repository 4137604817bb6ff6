"""What a server does when workers are added: bytes in a second, and what each byte costs it.

    make bench        or        python tests/benchmarks/bench_workers.py [--cycles 3]

Rows: 1, 2, 4 and 8 workers, processes of their own on this machine, that share one session of 2.5 M float32 parameters
in 56 tensors and take Adagrad steps without pause; each step moves 10 MB there and 10 MB back. Columns:

    GB/s         bytes of all workers, both ways, by the time from the first step's start to the last one's end
    step         median of a worker's step
    server CPU   processor seconds of the server for each GB

The rows take turns, `--cycles` times, and the median of each is printed. Workers and server share the cores: where
there are fewer cores than processes, a row says how the whole behaves under load, not what a server alone could do.
Target: GB/s does not fall as workers are added, and server CPU for each GB is flat.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.crowd import Task, cpu_s, crowd
from tests.benchmarks.hardware import hardware
from tests.service.servers import RunningServer, running_server

WORKERS = (1, 2, 4, 8)
PARAMETERS, TENSORS = 2_500_000, 56
STEPS = 240
"""Of all workers of a row together."""


class Row(NamedTuple):
    """State what one row came to in one cycle."""

    gb_per_s: float
    step_s: float
    cpu_s_per_gb: float


def measure(server: RunningServer, workers: int, *, sync: bool, cycle: int, steps: int = STEPS) -> Row:
    """Return what so many workers reach."""
    name = f"{'sync' if sync else 'async'}-{workers}-{cycle}"
    task = Task(server.url, name, workers, sync, PARAMETERS, TENSORS, max(1, steps // workers))
    with crowd(task) as ready:
        before_s = cpu_s(server.pid)
        done = ready.go()
        used_s = cpu_s(server.pid) - before_s
    gb = 2 * 4 * PARAMETERS * task.steps * workers / 1e9
    return Row(gb / done.wall_s, median(each for own in done.steps_s for each in own), used_s / gb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=3, help="how often the rows take turns")
    cycles = parser.parse_args(arguments).cycles
    print(f"{hardware()}; load {os.getloadavg()[0]:.1f} before")
    rows: dict[tuple[bool, int], list[Row]] = {(sync, count): [] for sync in (False, True) for count in WORKERS}
    with running_server() as server:
        for cycle in range(cycles):
            for (sync, count), found in rows.items():
                found.append(measure(server, count, sync=sync, cycle=cycle))
    print(f"{'mode':>6} {'workers':>8} {'GB/s':>7} {'step, ms':>9} {'server CPU s/GB':>16} {'GB/s to one':>12}")
    for (sync, count), found in rows.items():
        ours = [median(each) for each in zip(*found, strict=True)]
        alone = median(each.gb_per_s for each in rows[sync, 1])
        label = f"{'sync' if sync else 'async':>6} {count:>8}"
        print(f"{label} {ours[0]:>7.2f} {1e3 * ours[1]:>9.1f} {ours[2]:>16.2f} {ours[0] / alone:>11.2f}x")


if __name__ == "__main__":
    main()
