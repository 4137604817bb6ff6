"""A remote step against the physical limit, torch's own parameter server and a Ray actor, in one run.

    make bench        or        python tests/benchmarks/bench_wire.py [--cycles 3]

Rows: Adagrad steps of 25 M parameters in 56 tensors, 250,000 in 60, and 2,500 in 6; float32 over TCP loopback, one
worker, server and worker in processes of their own, one torch thread each. Columns: medians in milliseconds of the
sides that `sides.py` lists. Those without a figure are not installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.benchmarks.hardware import hardware
from tests.benchmarks.peers.torch_rpc import Size
from tests.benchmarks.rows import Row, absent, faster, within
from tests.benchmarks.sides import SIDES, Found, Work, take_turns

LARGE = Work(Size(25_000_000, 56), 7)
MIDDLE = Work(Size(250_000, 60), 100)
SMALL = Work(Size(2_500, 6), 300)
WORKS = (LARGE, MIDDLE, SMALL)
PEERS = {
    "RPC": "torch RPC, shared memory",
    "default": "torch RPC, as it comes",
    "uv": "torch RPC over TCP",
    "Ray": "a Ray actor",
}


class Targets(NamedTuple):
    """State what is wanted of a size; None leaves a row without a target.

    Attributes:
        raw, half, embedded: at most so many times raw sockets, float32, the embedded step (that of shared memory).
        rpc, ray, shared: at least so many times as fast as torch RPC, Ray, and (in shared memory) torch RPC.
    """

    raw: float | None = None
    rpc: float | None = None
    ray: float | None = None
    half: float | None = None
    embedded: float | None = None
    shared: float | None = None


TARGETS = {
    LARGE: Targets(1.2, 2.8, 2.8, 0.6, 1.3, 10),
    MIDDLE: Targets(raw=2, rpc=2.2, ray=5, shared=3),
    SMALL: Targets(rpc=2.2, shared=3),
}


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of all sizes."""
    return rows_of(take_turns(WORKS, 1 if quick else 3))


def rows_of(found: Found) -> list[Row]:
    """Return what was found, compared."""
    return [row for work in found.reports for row in _rows(found, work, TARGETS[work])]


def _rows(found: Found, work: Work, wanted: Targets) -> Iterator[Row]:
    ours, name = found.ms("farstep", work), f"{work.label}, TCP"
    yield within(name, ours, "ms", "raw sockets", found.ms("raw", work), wanted.raw)
    for side, peer in PEERS.items():
        limit = wanted.ray if side == "Ray" else wanted.rpc
        if found.has(side, work):
            yield faster(name, ours, "ms", peer, found.ms(side, work), limit)
        else:
            yield absent(f"{name}, against {peer}", "not installed: pip install 'farstep[ray]'")
    yield within(f"{name}, bfloat16", found.ms("bf16", work), "ms", "float32", ours, wanted.half)
    shared, name = found.ms("shared", work), f"{work.label}, shared memory"
    yield within(name, shared, "ms", "embedded", found.ms("embedded", work), wanted.embedded)
    for side in ("RPC", "default"):
        yield faster(name, shared, "ms", PEERS[side], found.ms(side, work), wanted.shared)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=3, help="how often the sides take turns")
    cycles = parser.parse_args(arguments).cycles
    torch.set_num_threads(1)
    print(hardware())
    found = take_turns(WORKS, cycles)
    print(f"{'parameters':>22}" + "".join(f"{side:>10}" for side in SIDES) + f"{'to raw':>9}{'to RPC':>9}")
    for work in WORKS:
        cells = "".join(f"{found.ms(side, work):>10.3f}" if found.has(side, work) else " " * 10 for side in SIDES)
        to_raw, to_rpc = (found.ms("farstep", work) / found.ms(side, work) for side in ("raw", "RPC"))
        print(f"{work.label:>22}{cells}{to_raw:>8.2f}x{to_rpc:>8.2f}x")
    for work, report in found.reports.items():
        parts = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in report.seconds.items())
        print(f"where the time of the last step of {work.label} went (ms, {report.kernel} kernel): {parts}")


if __name__ == "__main__":
    main()
