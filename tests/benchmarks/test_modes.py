"""The benchmarks of modes and of crowds measure what they say: run small, as anybody would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.bench_crowd import KINDS, Kind, measure
from tests.benchmarks.tasks import TASKS, digits
from tests.service.servers import running_server

HERE = Path(__file__).parent


def rows(table: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows by their first one."""
    cells = [[each.strip() for each in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells[2:]}


def test_training_with_a_worker_that_dies(tmp_path: Path) -> None:
    """Each way reaches its mark although a worker is killed again and again; the table says when, also as a file."""
    small = ["--workers", "2", "--surroundings", "killed", "--compute", "0.01", "--mark", "0.7"]
    command = [sys.executable, str(HERE / "bench_modes.py"), *small, "--mode", "async", "local-sgd", "diloco"]
    done = subprocess.run(
        [*command, "--markdown", str(tmp_path / "table.md")], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert list(found) == ["sync", "async", "local-sgd", "diloco"]
    for seconds, version, to_sync, reached, _ in found.values():
        assert float(seconds) > 0
        assert int(version) > 0
        assert float(to_sync.removesuffix(" x")) > 0
        assert float(reached) >= 0.7
    assert done.stdout.strip() in (tmp_path / "table.md").read_text()


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
    with running_server() as server:
        row = measure(server, kind, 5, 0, pushes=20)
    assert row.errors == 0
    assert 0 < row.p50_s <= row.p99_s
    assert row.per_s > 0
