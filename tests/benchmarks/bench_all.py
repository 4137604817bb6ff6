"""The one benchmark command: every target of this project in one run and one table.

    make bench        or        python tests/benchmarks/bench_all.py [--quick] [--rows wire,kernels] [--markdown FILE]

Each part is a module with a function `measure(quick=...)` that returns rows, and runs in a process of its own, one
after the other, with one torch thread and OpenMP threads that do not spin. A part that fails makes a row that says so;
the others go on, and the command ends with status 1. To add a part, write its module and name it in `PARTS`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, absent, from_json, plain, to_json, write_markdown

PARTS = (
    "wire",
    "calls",
    "workers",
    "kernels",
    "gpu",
    "overlap",
    "first",
    "memory",
    "embedded",
    "bookkeeping",
    "stragglers",
    "durability",
)
"""In the order of the table; each is `tests/benchmarks/bench_<part>.py`."""
APART = ("control", "crowd", "modes", "policies", "transport")
"""Benchmarks with a command and a table of their own: they take long, or answer another question."""
FAILED = "failed"
LIMIT_S = 600.0
"""Longest time of one part."""


def rows_of(part: str, *, quick: bool) -> list[Row]:
    """Return the rows of a part, measured in another process."""
    command = [sys.executable, __file__, "--only", part, *(["--quick"] if quick else [])]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return [absent(f"{FAILED}: {part}", f"not done within {LIMIT_S:g} s")]
    if done.returncode:
        return [absent(f"{FAILED}: {part}", f"ended with status {done.returncode}")]
    return from_json(done.stdout.splitlines()[-1])


def measure_here(part: str, *, quick: bool) -> Sequence[Row]:
    """Return the rows of a part, measured in this process."""
    import torch

    torch.set_num_threads(1)
    rows: Sequence[Row] = import_module(f"tests.benchmarks.bench_{part}").measure(quick=quick)
    return rows


def parts_of(text: str) -> list[str]:
    """Return the parts that the command line names, in the order of the table.

    Raises:
        argparse.ArgumentTypeError: there is no such part.
    """
    wanted = text.split(",")
    if unknown := [each for each in wanted if each not in PARTS]:
        raise argparse.ArgumentTypeError(f"there are no rows {unknown[0]!r}; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in wanted]


def ended_well(rows: Iterable[Row]) -> bool:
    """Return whether all parts were measured; a missed target is a result, not a failure."""
    return not any(row.work.startswith(FAILED) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes: a look, not a result")
    parser.add_argument("--rows", type=parts_of, default=list(PARTS), metavar="A,B", help=", ".join(PARTS))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between the markers of this file")
    parser.add_argument("--json", action="store_true", help="print the rows as one line of JSON")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    if told.only:
        print(to_json(measure_here(told.only, quick=told.quick)))
        return 0
    title = f"{hardware()}; load {os.getloadavg()[0]:.1f} before{'; a quick run' if told.quick else ''}"
    began = time.monotonic()
    rows: list[Row] = []
    for part in told.rows:
        print(f"measuring {part} …", file=sys.stderr, flush=True)
        rows += rows_of(part, quick=told.quick)
    if told.json:
        print(to_json(rows))
    else:
        print(f"{title}\n\n{plain(rows)}\nMeasured in {time.monotonic() - began:.0f} s.")
    if told.markdown:
        write_markdown(told.markdown, rows, title)
    return 0 if ended_well(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
