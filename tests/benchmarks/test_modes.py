"""The benchmarks of modes and of crowds measure what they say: run small, as anybody would run them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.bench_crowd import KINDS, Kind, measure
from tests.benchmarks.bench_modes import BY_NAME, Bench, rates_table, table
from tests.benchmarks.tasks import TASKS, digits
from tests.benchmarks.trainers import Outcome, Surroundings, Way
from tests.support.service.servers import running_server

HERE = Path(__file__).parent


def rows(table: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows by their first one."""
    cells = [[each.strip() for each in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells[2:]}


def test_training_with_a_worker_that_dies(tmp_path: Path) -> None:
    """Each way reaches its mark although a worker is killed at its very beginning; the table is also a file."""
    small = [
        "--workers",
        "2",
        "--surroundings",
        "killed",
        "--compute",
        "0.01",
        "--mark",
        "0.7",
        "--rates",
        "0.01",
        "--first-kill",
        "0",
    ]
    command = [sys.executable, str(HERE / "bench_modes.py"), *small, "--mode", "async", "local-sgd", "diloco"]
    done = subprocess.run(
        [*command, "--markdown", str(tmp_path / "table.md")], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert list(found) == ["sync", "async", "local-sgd", "diloco"]
    for rate, seconds, to_sync, version, reached, killed, cores in found.values():
        assert float(rate) == 0.01
        assert float(seconds) > 0
        assert float(to_sync.removesuffix(" x")) > 0
        assert int(version) > 0
        assert float(reached) >= 0.7
        assert int(killed) >= 1
        assert 0 < float(cores.removesuffix("%")) <= 100
    assert done.stdout.strip() in (tmp_path / "table.md").read_text()


def test_each_mode_has_the_rate_with_which_it_is_first() -> None:
    """Rates that never get there are left out, slower ones are given up early, and modes of one kind share theirs."""
    allowed: list[float] = []

    def trained(way: Way, rate: float, surroundings: str, within_s: float) -> Outcome:
        allowed.append(within_s)
        return Outcome(seconds={("sync", 0.1): 4.0, ("async", 0.1): 8.0, ("async", 0.01): 6.0}.get((way.name, rate)))

    task = replace(digits(), rates=(1.0, 0.1, 0.01))
    bench = Bench(task, workers=4, within_s=60.0, train=trained)
    lines = rates_table(bench, [BY_NAME[each] for each in ("sync", "quorum", "bounded-32")])
    assert rows("\n".join(lines)) == {"sync": ["–", "4.0", "–"], "async": ["6.0", "8.0", "–"]}
    assert allowed == [60, 60, 6, 60, 60, 12]
    assert [bench.rate(BY_NAME[each]) for each in ("sync", "quorum", "live", "bounded-32")] == [0.1, 0.1, 0.1, 0.01]


def test_a_table_shows_the_median_training() -> None:
    """Of three trainings that in the middle is shown, one that did not get there counts as the slowest."""
    took = {"sync": iter([9.0, None, 8.0]), "async": iter([None, 3.0, None])}
    ways = [BY_NAME["sync"], BY_NAME["async"]]
    bench = Bench(
        digits(),
        workers=4,
        within_s=60.0,
        train=lambda way, rate, surroundings, within_s: Outcome(seconds=next(took[way.name]), cores=0.8),
        rates={"sync": 0.1, "async": 0.01},
    )
    lines = table(bench, "even", bench.measure(ways, "even", cycles=3))
    found = rows("\n".join(lines))
    assert found["sync"][:3] == ["0.1", "9.0", "1.00 x"]
    assert found["async"][:3] == ["0.01", "not within the time", "–"]
    assert lines[-1] == "Measures cores, more than 70% of which were in use: sync, async."


def test_workers_are_slow_in_turn() -> None:
    """With turns, one worker at a time is slow, each as long as any other; without them the last one is."""
    turns = Surroundings(workers=3, compute_s=1.0, slow=5.0, turn_s=2.0)
    assert [[turns.takes_s(worker, now_s) for worker in range(3)] for now_s in (0.0, 1.9, 2.0, 5.0, 6.0)] == [
        [5, 1, 1],
        [5, 1, 1],
        [1, 5, 1],
        [1, 1, 5],
        [5, 1, 1],
    ]
    always = replace(turns, turn_s=0.0)
    assert [always.takes_s(worker, 3.0) for worker in range(3)] == [1, 1, 5]
    assert replace(always, workers=1).takes_s(0, 3.0) == 1


@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_are_the_same_each_time(name: str) -> None:
    """A batch is a function of worker and step, the first model is always the same, and it has not learned anything."""
    task, again = TASKS[name](), TASKS[name]()
    for here, there in zip(task.batch(1, 2), again.batch(1, 2), strict=True):
        assert here.equal(there)
    assert not task.batch(1, 2)[0].equal(task.batch(1, 3)[0])
    assert not task.batch(1, 2)[0].equal(task.batch(2, 2)[0])
    assert task.measure(task.build()) == again.measure(again.build())
    assert not task.reached(task.measure(task.build()))
    assert digits(0.5).reached(0.6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_crowd_is_measured_without_errors(kind: Kind) -> None:
    """Five connections push in one session, or each in its own, and every push is answered."""
    with running_server(loaded=True) as server:
        row = measure(server, kind, 5, 0, pushes=20)
    assert row.errors == 0
    assert 0 < row.p50_s <= row.p99_s
    assert row.per_s > 0
