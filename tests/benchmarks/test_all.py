"""The benchmark command runs the parts that it is asked for, in their order, and says when one fails."""

from __future__ import annotations

import argparse
import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest

from tests.benchmarks import bench_all
from tests.benchmarks.bench_first import Step, rows_of
from tests.benchmarks.bench_wire import MIDDLE, SMALL
from tests.benchmarks.bench_wire import rows_of as wire_rows
from tests.benchmarks.bench_workers import Figures
from tests.benchmarks.bench_workers import rows_of as worker_rows
from tests.benchmarks.rows import BEGIN, END, absent, shown
from tests.benchmarks.sides import OURS, RPC, Found

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.mark.parametrize("part", bench_all.PARTS)
def test_every_part_measures_by_the_same_interface(part: str):
    """Each module that is named has a `measure` that takes `quick` by its name."""
    (only,) = inspect.signature(import_module(f"tests.benchmarks.bench_{part}").measure).parameters.values()
    assert (only.name, only.kind) == ("quick", inspect.Parameter.KEYWORD_ONLY)


def test_every_benchmark_is_a_part():
    """No module lies beside the command that it does not run, but those that are named as being apart."""
    modules = {path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")}
    assert modules - {"all"} == {*bench_all.PARTS, *bench_all.APART}


def test_rows_are_chosen_in_the_order_of_the_table():
    """However they are named, parts keep their order, and one that does not exist is refused."""
    assert bench_all.parts_of("memory,wire") == ["wire", "memory"]
    with pytest.raises(argparse.ArgumentTypeError, match="'wires'"):
        bench_all.parts_of("wires")


def test_the_command_prints_and_writes_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A real part, measured in a process of its own, is in the output and in the document."""
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}{END}")
    assert bench_all.main(["--quick", "--rows", "bookkeeping", "--json", "--markdown", str(page)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["unit"] == "µs"
    assert f"| {row['work']} |" in page.read_text()


def test_a_part_that_fails_is_a_failure_and_a_missed_target_is_not():
    """The command's status says whether everything was measured, not whether it was good."""
    assert not bench_all.ended_well([shown("a", 1, "s"), absent("failed: wire", "ended with status 1")])
    assert bench_all.ended_well([shown("a", 1, "s"), absent("on a GPU", "no GPU here")])


def test_the_page_of_results_has_a_place_for_the_table():
    """`--markdown docs/benchmarks.md` finds its markers."""
    text = DOCUMENT.read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_step_over_the_wire_is_compared_with_each_peer():
    """Medians become ratios and verdicts; a peer that is not installed has a row that says how to get it."""
    found = Found(reports=dict.fromkeys((MIDDLE, SMALL)))  # type: ignore[arg-type]
    for side in ("raw", *OURS, *RPC):
        for work in (MIDDLE, SMALL):
            found.add(side, work, [0.002, 0.003, 0.004] if side in RPC else [0.0009, 0.001, 0.5])
    rows = wire_rows(found)
    by_raw, by_rpc, _, _, by_ray, *_ = rows
    assert (by_raw.ratio, by_raw.met, by_rpc.ratio, by_rpc.met) == (1.0, True, 3.0, True)
    assert by_ray.measured is None
    assert "pip install" in by_ray.against
    assert [row.work for row in rows if row.met is False] == []


def test_workers_are_compared_with_the_best_of_fewer():
    """Throughput may not fall below that of any smaller crowd; the server's CPU is compared with that of one worker."""
    reached = zip((1, 2, 4), (1.0, 2.0, 1.5), (0.3, 0.3, 0.36), strict=True)
    found = {(False, count): Figures(gb, 0.01, cpu) for count, gb, cpu in reached}
    two, two_cpu, four, four_cpu = worker_rows(found)
    assert (two.ratio, two.met, two_cpu.met) == (2.0, True, True)
    assert (four.ratio, four.met, four_cpu.ratio, four_cpu.met) == (0.75, False, 1.2, False)


def test_first_steps_are_judged_by_time_kernel_and_replay():
    """A slow first step, a fused kernel that never came, and a replay that differs are all missed."""
    good = [Step(0.2, 0.2, "reference"), Step(0.1, 0.3, "reference"), Step(0.1, 0.4, "fused")]
    assert [row.met for row in rows_of("first", good, 0)] == [True, True, True]
    bad = [Step(9.0, 9.0, "reference"), Step(0.1, 9.1, "reference")]
    assert [row.met for row in rows_of("first", bad, 3)] == [False, False, False]
