"""A remote step against the physical limit and against torch's own parameter server, in one run.

    make bench        or        python tests/benchmarks/bench_wire.py [--cycles 3]

Rows: Adagrad steps of 25 M parameters in 56 tensors, 250,000 in 60, and 2,500 in 6; float32 over TCP loopback, one
worker, server and worker in processes of their own, one torch thread each. Columns, in milliseconds (medians):

    raw        the same bytes there and back over plain sockets, nothing computed: the limit
    farstep    `optimizer.step()`: gradients there, a fused Adagrad step, parameters back into the model
    bfloat16   the same step with `wire="bf16"`: float32 at both ends, half the bytes between
    shared     the same over a unix socket, with gradients and parameters in shared memory where that is used
    embedded   the same in this process, with nothing to move
    torch RPC  torch.distributed.rpc (TensorPipe) parameter server, the same step with torch.optim.Adagrad(fused=True)

The sides take turns, `--cycles` times, so that a machine whose speed drifts does not favour one of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import farstep
from farstep.narrow import Half
from tests.benchmarks.hardware import hardware
from tests.benchmarks.peers import raw_sockets, torch_rpc
from tests.benchmarks.peers.torch_rpc import Size
from tests.service.servers import running_server

SIZES = (Size(25_000_000, 56), Size(250_000, 60), Size(2_500, 6))
ROUNDS = (7, 100, 300)
SIDES = ("raw", "farstep", "shared", "embedded", "rpc")
LIMITS = ("at most 1.6 x raw", "", "at most torch RPC")
HALF_LIMIT = "at most 0.6 x float32"


def parameters_of(size: Size) -> list[torch.nn.Parameter]:
    """Return parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(length, generator=generator)) for length in size.lengths]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def remote_steps(
    url: str | None, size: Size, rounds: int, wire: Half | None = None
) -> tuple[list[float], farstep.StepReport]:
    """Return the seconds of timed steps against a server, and the report of the last one."""
    optimizer = farstep.optim.Adagrad(parameters_of(size), server=url, kernel="fused", wire=wire)
    try:
        for _ in range(max(2, rounds // 5)):
            optimizer.step()
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        assert optimizer.last_step is not None
        return seconds, optimizer.last_step
    finally:
        optimizer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=3, help="how often the sides take turns")
    cycles = parser.parse_args(arguments).cycles
    torch.set_num_threads(1)
    print(hardware())
    times: dict[str, list[list[float]]] = {
        side: [[] for _ in SIZES] for side in ("raw", "farstep", "bf16", "shared", "embedded", "rpc")
    }
    reports: list[farstep.StepReport] = []
    with TemporaryDirectory() as directory, running_server("--unix", f"{directory}/s") as server:
        for _ in range(cycles):
            for place, (size, rounds) in enumerate(zip(SIZES, ROUNDS, strict=True)):
                times["raw"][place] += raw_sockets.measure_all([4 * size.parameters], rounds)[0]
                seconds, report = remote_steps(server.url, size, rounds)
                times["farstep"][place] += seconds
                reports.append(report)
                times["bf16"][place] += remote_steps(server.url, size, rounds, "bf16")[0]
                times["shared"][place] += remote_steps(server.unix, size, rounds)[0]
                times["embedded"][place] += remote_steps(None, size, rounds)[0]
                times["rpc"][place] += torch_rpc.measure_all([size], rounds)[0]
    heads = " ".join(f"{side:>9}" for side in SIDES)
    print(f"{'parameters':>22} {heads} {'to raw':>8} {'to RPC':>8}  target")
    for place, size in enumerate(SIZES):
        medians = {side: 1e3 * median(times[side][place]) for side in SIDES}
        label = f"{size.parameters:,} in {size.tensors}"
        columns = " ".join(f"{each:>9.3f}" for each in medians.values())
        to_raw, to_rpc = (medians["farstep"] / medians[side] for side in ("raw", "rpc"))
        print(f"{label:>22} {columns} {to_raw:>7.2f}x {to_rpc:>7.2f}x  {LIMITS[place]}")
    for place, size in enumerate(SIZES):
        ours, half = (1e3 * median(times[side][place]) for side in ("farstep", "bf16"))
        limit = "" if place else f"  {HALF_LIMIT}"
        print(f"{size.parameters:>12,} in bfloat16 on the wire {half:>9.3f} ms, {half / ours:.2f} x float32{limit}")
    for size, report in zip(SIZES, reports[-len(SIZES) :], strict=True):
        parts = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in report.seconds.items())
        print(f"where the time of the last step of {size.parameters:,} went (ms, {report.kernel} kernel): {parts}")


if __name__ == "__main__":
    main()
