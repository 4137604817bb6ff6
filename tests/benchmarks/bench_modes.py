"""How long real training takes in each consistency mode, with slow workers and dying ones.

    python tests/benchmarks/bench_modes.py                                     # 4 workers, all surroundings, digits
    python tests/benchmarks/bench_modes.py --workers 1 2 4 8 --task digits text --cycles 3 --markdown modes.md

Workers share a session on a server of their own and train until the first one has reached the mark: the time to it, the
session's version then, and the time against plain sync in the same surroundings (above 1 is faster). A step is a batch
of 32 on each worker and a simulated backward pass; see `trainers.py`. Surroundings:

    even         all workers take 50 ms for a backward pass
    straggler    the last one takes 5 times as long
    turns        one of them takes 5 times as long, each for 2 s, in turn
    killed       one worker is killed with SIGKILL after 2 s and then every 10 s, and comes back 3 s later

`--compute` says how long a backward pass takes; turns, kills and returns are as many steps apart as with 50 ms.

A mode has the learning rate, of those given, with which it is first where nothing goes wrong: one that suits the mean
of eight gradients is too large for steps of one stale gradient each. What each rate came to is a table of its own.

*cores* is the share of all cores that workers, server and benchmark used. Above 70 % it is cores that were measured,
and the table says so. Other jobs on the machine are not in it: mind them yourself.

A mode that this release does not have is left out, and named. Target: with a straggler `quorum` and `bounded` reach the
mark at least twice as fast as sync.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from farstep.errors import InvalidOption
from tests.benchmarks.hardware import hardware
from tests.benchmarks.tasks import TASKS, Task
from tests.benchmarks.trainers import Outcome, Surroundings, Way, train, warm_up
from tests.support.service.servers import RunningServer, running_server

WITHIN_S = 120.0
EVERY = 8
"""Local steps in a round."""
FIRST_KILL = 40
"""Backward passes until the first kill."""
CROWDED = 0.7
"""Share of the cores above which a row measures them."""
PATIENCE = 1.5
"""A learning rate that takes as many times as long as the best one so far is given up."""

WAYS = (
    Way(name="sync", consistency=lambda n: {"mode": "sync", "workers": n}),
    Way(name="quorum", consistency=lambda n: {"mode": "sync", "workers": n, "quorum": max(1, n - 1)}, rates_of="sync"),
    Way(name="live", consistency=lambda n: {"mode": "sync", "workers": "live", "lease_s": 1.0}, rates_of="sync"),
    Way(name="bounded-32", consistency=lambda n: {"mode": "bounded", "staleness": 32}, rates_of="async"),
    Way(name="bounded-128", consistency=lambda n: {"mode": "bounded", "staleness": 128}, rates_of="async"),
    Way(name="async", consistency=lambda n: {"mode": "async"}),
    Way(name="local-sgd", consistency=lambda n: {"mode": "sync", "workers": n}, rounds=EVERY, outer="LocalSGD"),
    Way(name="diloco", consistency=lambda n: {"mode": "sync", "workers": n}, rounds=EVERY, outer="DiLoCo"),
)
BY_NAME = {each.name: each for each in WAYS}
SURROUNDINGS = ("even", "straggler", "turns", "killed")


def around(name: str, workers: int, compute_s: float, first_kill: float = FIRST_KILL) -> Surroundings:
    """Return the surroundings of a name, in which the first kill comes after so many steps."""
    return Surroundings(
        workers=workers,
        compute_s=compute_s,
        slow=5.0 if name in ("straggler", "turns") else 1.0,
        turn_s=40 * compute_s if name == "turns" else 0.0,
        killed_every_s=200 * compute_s if name == "killed" else 0.0,
        first_kill_s=first_kill * compute_s,
        restart_s=60 * compute_s,
    )


Trained = Callable[[Way, float, str, float], Outcome]
"""Train in some way at a learning rate, in surroundings of that name, for at most so many seconds."""


@dataclass(slots=True)
class Bench:
    """The trainings of one task with one number of workers.

    Attributes:
        within_s: how long each may take.
        train: trains once.
        rates: the learning rate of each way that has its own, once it is known.
    """

    task: Task
    workers: int
    within_s: float
    train: Trained
    rates: dict[str, float] = field(default_factory=dict)

    def choose(self, way: Way) -> Mapping[float, Outcome]:
        """Return what each learning rate came to where nothing goes wrong, and take the best one for a way."""
        found: dict[float, Outcome] = {}
        within_s = self.within_s
        for rate in self.task.rates:
            found[rate] = outcome = self.train(way, rate, "even", within_s)
            if outcome.seconds is not None:
                within_s = min(within_s, PATIENCE * outcome.seconds)
        self.rates[way.name] = min(found, key=lambda rate: found[rate].seconds or float("inf"))
        return dict(sorted(found.items()))

    def rate(self, way: Way) -> float:
        """Return a way's learning rate."""
        return self.rates[way.rates_of or way.name]

    def measure(self, ways: Sequence[Way], surroundings: str, cycles: int) -> dict[str, Outcome]:
        """Return the median training of each way: they take turns, so that what disturbs one disturbs all."""
        found: dict[str, list[Outcome]] = {each.name: [] for each in ways}
        for _ in range(cycles):
            for way in ways:
                found[way.name].append(self.train(way, self.rate(way), surroundings, self.within_s))
        return {name: _median(outcomes) for name, outcomes in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["digits"], choices=list(TASKS), help="what is trained")
    parser.add_argument("--workers", nargs="+", type=int, default=[4], metavar="N", help="how many workers")
    parser.add_argument("--mode", nargs="+", choices=[each.name for each in WAYS], help="only these, and sync")
    parser.add_argument("--surroundings", nargs="+", default=SURROUNDINGS, choices=SURROUNDINGS)
    parser.add_argument("--cycles", type=int, default=1, help="how often; the median trainings are printed")
    parser.add_argument("--within", type=float, default=WITHIN_S, metavar="S", help="seconds that a training may take")
    parser.add_argument("--mark", type=float, help="the accuracy, or loss, to reach; each task has its own")
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="learning rates to choose among, as well")
    parser.add_argument(
        "--rate", nargs="+", type=_rate, default=[], metavar="MODE=LR", help="the rate of a mode: none is chosen then"
    )
    parser.add_argument("--every", type=int, default=EVERY, metavar="H", help="local steps in a round")
    parser.add_argument("--compute", type=float, default=0.05, metavar="S", help="seconds of a backward pass")
    parser.add_argument(
        "--first-kill", type=float, default=FIRST_KILL, metavar="STEPS", help="backward passes until then"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    options = parser.parse_args(arguments)
    wanted = [each for each in WAYS if options.mode is None or each.name in (*options.mode, "sync")]
    chosen = [replace(each, rounds=options.every) if each.rounds else each for each in wanted]
    ways = [each for each in chosen if _is_there(each)]
    report = [f"{hardware()}"]
    if missing := [each.name for each in chosen if each not in ways]:
        report += ["", f"Not in this release: {', '.join(missing)}."]

    def tell(lines: Sequence[str]) -> None:
        report.extend(lines)
        print("\n".join(lines), flush=True)
        if options.markdown:
            options.markdown.write_text("\n".join(report) + "\n")

    warm_up()
    with running_server() as server:
        for name in options.task:
            task = TASKS[name]()
            task = task if options.mark is None else replace(task, mark=options.mark)
            task = task if options.rates is None else replace(task, rates=tuple(options.rates))
            for workers in options.workers:
                places = {each: around(each, workers, options.compute, options.first_kill) for each in SURROUNDINGS}
                trained = _trained(server, task, places)
                bench = Bench(task, workers, options.within, trained, dict(options.rate))
                tell(rates_table(bench, ways))
                for surroundings in options.surroundings:
                    if workers > 1 or surroundings == "even":
                        tell(table(bench, surroundings, bench.measure(ways, surroundings, options.cycles)))


def _trained(server: RunningServer, task: Task, places: Mapping[str, Surroundings]) -> Trained:
    """Return what trains, in a session of its own each time."""
    counted = itertools.count()

    def trained(way: Way, rate: float, surroundings: str, within_s: float) -> Outcome:
        place = places[surroundings]
        session = f"{task.name}-{place.workers}-{surroundings}-{way.name}-{next(counted)}"
        return train(task, way, rate, place, server, session, within_s=within_s)

    return trained


def _rate(said: str) -> tuple[str, float]:
    name, _, rate = said.partition("=")
    if name not in (own := [each.name for each in WAYS if not each.rates_of]):
        raise argparse.ArgumentTypeError(f"{said!r}: MODE is one of {', '.join(own)}, whose rate the others have, too")
    return name, float(rate)


def _is_there(way: Way) -> bool:
    try:
        way.mode(2)
    except InvalidOption:
        return False
    return True


def rates_table(bench: Bench, ways: Sequence[Way]) -> list[str]:
    """Choose the learning rates and return the lines of a table that says why; none where there is no choice."""
    rates = bench.task.rates
    own = [each for each in dict.fromkeys(each.rates_of or each.name for each in ways) if each not in bench.rates]
    if len(rates) == 1:
        bench.rates |= dict.fromkeys(own, rates[0])
    if len(rates) == 1 or not own:
        return []
    lines = [
        *_heading(bench, "even", "at each learning rate, s"),
        f"| mode | {' | '.join(f'{rate:g}' for rate in sorted(rates))} |",
        "|---" * (1 + len(rates)) + "|",
    ]
    named = BY_NAME | {each.name: each for each in ways}
    for name in own:
        found = bench.choose(named[name])
        cells = [f"{each.seconds:.1f}" if each.seconds else "–" for each in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table(bench: Bench, surroundings: str, found: Mapping[str, Outcome]) -> list[str]:
    """Return the lines of one table."""
    lines = [
        *_heading(bench, surroundings),
        "| mode | lr | time to it, s | to sync | steps of the session | reached | killed | cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = found["sync"].seconds
    for name, each in found.items():
        gain = f"{plain / each.seconds:.2f} x" if plain and each.seconds else "–"
        took = f"{each.seconds:.1f}" if each.seconds else f"not within {(each.failures or ['the time'])[0]}"
        cells = [f"{bench.rate(BY_NAME[name]):g}", took, gain, str(each.version), f"{each.best:.3f}", str(each.kills)]
        lines.append(f"| {name} | {' | '.join(cells)} | {each.cores:.0%} |")
    if crowded := [name for name, each in found.items() if each.cores > CROWDED]:
        lines += ["", f"Measures cores, more than {CROWDED:.0%} of which were in use: {', '.join(crowded)}."]
    return lines


def _heading(bench: Bench, surroundings: str, what: str = "") -> list[str]:
    task, workers = bench.task, bench.workers
    mark = " ".join(["accuracy" if task.rising else "loss", f"{task.mark:g}", what]).strip()
    return ["", f"**{task.name}, {workers} worker{'s' if workers > 1 else ''}, {surroundings}**: time to {mark}", ""]


def _median(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome in the middle; those that did not reach the mark are the slowest."""
    return sorted(outcomes, key=lambda each: each.seconds or float("inf"))[len(outcomes) // 2]


if __name__ == "__main__":
    main()
