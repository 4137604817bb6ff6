"""How long real training takes in each consistency mode, with slow workers and dying ones.

    python tests/benchmarks/bench_modes.py                                     # 4 workers, three surroundings, digits
    python tests/benchmarks/bench_modes.py --workers 1 2 4 8 --task digits text --markdown modes.md

Workers share a session on a server of their own and train until the first one has reached the mark: the time to it, the
session's version then, and the time against plain sync in the same surroundings (above 1 is faster). A step is a batch
of 32 on each worker and a simulated backward pass; see `trainers.py`. Surroundings:

    even         all workers take 50 ms for a backward pass
    straggler    the last one takes 5 times as long
    killed       one worker is killed with SIGKILL every 10 s, and comes back 3 s later (both for 50 ms)

A mode that this release does not have is left out, and named. Target: with a straggler `quorum` and `bounded` reach the
mark at least twice as fast as sync.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from farstep.errors import InvalidOption
from tests.benchmarks.hardware import hardware
from tests.benchmarks.tasks import TASKS, Task
from tests.benchmarks.trainers import Outcome, Surroundings, Way, train, warm_up
from tests.service.servers import running_server

WITHIN_S = 120.0
EVERY = 8
"""Local steps in a round."""

WAYS = (
    Way(name="sync", consistency=lambda n: {"mode": "sync", "workers": n}),
    Way(name="quorum", consistency=lambda n: {"mode": "sync", "workers": n, "quorum": max(1, n - 1)}),
    Way(name="live", consistency=lambda n: {"mode": "sync", "workers": "live", "lease_s": 1.0}),
    Way(name="bounded", consistency=lambda n: {"mode": "bounded", "staleness": 32}),
    Way(name="async", consistency=lambda n: {"mode": "async"}),
    Way(name="local-sgd", consistency=lambda n: {"mode": "sync", "workers": n}, rounds=EVERY, outer="LocalSGD"),
    Way(name="diloco", consistency=lambda n: {"mode": "sync", "workers": n}, rounds=EVERY, outer="DiLoCo"),
)
SURROUNDINGS = ("even", "straggler", "killed")


def around(name: str, workers: int, compute_s: float) -> Surroundings:
    """Return the surroundings of a name."""
    return Surroundings(
        workers=workers,
        compute_s=compute_s,
        slow=5.0 if name == "straggler" else 1.0,
        killed_every_s=200 * compute_s if name == "killed" else 0.0,
        restart_s=60 * compute_s,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["digits"], choices=list(TASKS), help="what is trained")
    parser.add_argument("--workers", nargs="+", type=int, default=[4], metavar="N", help="how many workers")
    parser.add_argument("--mode", nargs="+", choices=[each.name for each in WAYS], help="only these, and sync")
    parser.add_argument("--surroundings", nargs="+", default=SURROUNDINGS, choices=SURROUNDINGS)
    parser.add_argument("--cycles", type=int, default=1, help="how often; medians are printed")
    parser.add_argument("--within", type=float, default=WITHIN_S, metavar="S", help="seconds that a training may take")
    parser.add_argument("--mark", type=float, help="the accuracy, or loss, to reach; each task has its own")
    parser.add_argument("--compute", type=float, default=0.05, metavar="S", help="seconds of a backward pass")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    options = parser.parse_args(arguments)
    chosen = [each for each in WAYS if options.mode is None or each.name in (*options.mode, "sync")]
    ways = [each for each in chosen if _is_there(each)]
    report = [f"{hardware()}"]
    if missing := [each.name for each in chosen if each not in ways]:
        report += ["", f"Not in this release: {', '.join(missing)}."]
    warm_up()
    with running_server() as server:
        for name in options.task:
            task = TASKS[name]()
            task = task if options.mark is None else replace(task, mark=options.mark)
            for workers in options.workers:
                for surroundings in options.surroundings:
                    if workers == 1 and surroundings != "even":
                        continue
                    found = {
                        way.name: [
                            train(
                                task,
                                way,
                                around(surroundings, workers, options.compute),
                                server.url,
                                f"{name}-{workers}-{surroundings}-{way.name}-{cycle}",
                                within_s=options.within,
                            )
                            for cycle in range(options.cycles)
                        ]
                        for way in ways
                    }
                    report += table(task, workers, surroundings, found)
                    print("\n".join(report[-len(found) - 5 :]), flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(report) + "\n")


def _is_there(way: Way) -> bool:
    try:
        way.mode(2)
    except InvalidOption:
        return False
    return True


def table(task: Task, workers: int, surroundings: str, found: dict[str, list[Outcome]]) -> list[str]:
    """Return the lines of one table."""
    what = f"{'accuracy' if task.rising else 'loss'} {task.mark:g}"
    lines = ["", f"**{task.name}, {workers} worker{'s' if workers > 1 else ''}, {surroundings}**: time to {what}", ""]
    lines += [
        "| mode | time to it, s | steps of the session | to sync | reached | killed |",
        "|---|---|---|---|---|---|",
    ]
    plain = _seconds(found["sync"])
    for name, outcomes in found.items():
        seconds = _seconds(outcomes)
        last = outcomes[-1]
        gain = f"{plain / seconds:.2f} x" if plain and seconds else "–"
        took = f"{seconds:.1f}" if seconds else f"not within {last.failures[0] if last.failures else 'the time'}"
        lines.append(f"| {name} | {took} | {last.version} | {gain} | {last.best:.3f} | {last.kills} |")
    return lines


def _seconds(outcomes: Sequence[Outcome]) -> float | None:
    """Return the median time, None if one of them did not get there."""
    took = [each.seconds for each in outcomes if each.seconds is not None]
    return median(took) if len(took) == len(outcomes) else None


if __name__ == "__main__":
    main()
