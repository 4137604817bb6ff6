"""What a server does when workers are added: bytes in a second, and what each byte costs it.

    make bench        or        python tests/benchmarks/bench_workers.py [--cycles 3]

Rows: 1, 2, 4 and 8 workers, processes of their own on this machine, that share one session of 2.5 M float32 parameters
in 56 tensors and take Adagrad steps without pause; each step moves 10 MB there and 10 MB back. Columns:

    GB/s         bytes of all workers, both ways, by the time from the first step's start to the last one's end
    step         median of a worker's step
    server CPU   processor seconds of the server for each GB

The rows take turns, `--cycles` times, and the median of each is printed. Workers and server share the cores: where
there are fewer cores than processes, a row says how the whole behaves under load, not what a server alone could do.
Target: GB/s does not fall as workers are added (by 5 % at most, below the best of fewer), and server CPU for each GB is
flat (to 10 %, against one worker).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.crowd import Task, cpu_s, crowd
from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, gained, within
from tests.support.service.servers import RunningServer, running_server

WORKERS = (1, 2, 4, 8)
PARAMETERS, TENSORS = 2_500_000, 56
STEPS = 240
"""Of all workers of a row together."""


ROUGHLY = 0.05
"""How much of a difference is still flat: a row of itself comes out that much apart."""


class Figures(NamedTuple):
    """State what so many workers reached."""

    gb_per_s: float
    step_s: float
    cpu_s_per_gb: float


Found = dict[tuple[bool, int], Figures]
"""By mode (whether sync) and number of workers."""


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of each number of workers: against the best of fewer, and its CPU against that of one."""
    return rows_of(take_turns(1, (1, 4), STEPS // 3) if quick else take_turns(2))


def rows_of(found: Found) -> list[Row]:
    """Return what was found, compared."""
    rows = []
    for sync in sorted({mode for mode, _ in found}):
        counts = [count for mode, count in found if mode == sync]
        for fewer, count in pairwise(counts):
            name = f"{count} {'sync' if sync else 'async'} workers, {PARAMETERS:,}"
            ours, best = found[sync, count], max(found[sync, each].gb_per_s for each in counts if each <= fewer)
            rows.append(gained(name, ours.gb_per_s, "GB/s", "fewer workers", best, 1 - ROUGHLY))
            alone = found[sync, counts[0]].cpu_s_per_gb
            rows.append(within(f"{name}, server CPU", ours.cpu_s_per_gb, "s/GB", "one worker", alone, 1 + 2 * ROUGHLY))
    return rows


def take_turns(cycles: int, workers: Sequence[int] = WORKERS, steps: int = STEPS) -> Found:
    """Measure all, one after the other, `cycles` times, and return the medians."""
    each: dict[tuple[bool, int], list[Figures]] = {(sync, count): [] for sync in (False, True) for count in workers}
    with running_server() as server:
        for cycle in range(cycles):
            for (sync, count), figures in each.items():
                figures.append(figures_of(server, count, sync=sync, cycle=cycle, steps=steps))
    return {place: Figures(*map(median, zip(*figures, strict=True))) for place, figures in each.items()}


def figures_of(server: RunningServer, workers: int, *, sync: bool, cycle: int, steps: int) -> Figures:
    """Return what so many workers reach."""
    name = f"{'sync' if sync else 'async'}-{workers}-{cycle}"
    task = Task(server.url, name, workers, sync, PARAMETERS, TENSORS, max(1, steps // workers))
    with crowd(task) as ready:
        before_s = cpu_s(server.pid)
        done = ready.go()
        used_s = cpu_s(server.pid) - before_s
    gb = 2 * 4 * PARAMETERS * task.steps * workers / 1e9
    return Figures(gb / done.wall_s, median(each for own in done.steps_s for each in own), used_s / gb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=3, help="how often the rows take turns")
    cycles = parser.parse_args(arguments).cycles
    print(f"{hardware()}; load {os.getloadavg()[0]:.1f} before")
    found = take_turns(cycles)
    print(f"{'mode':>6} {'workers':>8} {'GB/s':>7} {'step, ms':>9} {'server CPU s/GB':>16} {'GB/s to one':>12}")
    for (sync, count), ours in found.items():
        label = f"{'sync' if sync else 'async':>6} {count:>8}"
        to_one = ours.gb_per_s / found[sync, 1].gb_per_s
        print(f"{label} {ours.gb_per_s:>7.2f} {1e3 * ours.step_s:>9.1f} {ours.cpu_s_per_gb:>16.2f} {to_one:>11.2f}x")


if __name__ == "__main__":
    main()
