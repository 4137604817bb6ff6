"""The first steps of a session on a server that has never compiled anything.

    make bench        or        python tests/benchmarks/bench_first.py

A server with an empty directory for kernels, and one worker with an Adagrad of 25 M float32 parameters in 56 tensors
that steps without pause. A compiler takes seconds for a kernel; measured is

    the first step       joining the session and the connection apart, against the median of those after it that ran
                         the same kernel: nothing is compiled inside it
    taking over          when the first step ran on the fused kernel, and how many went before it
    replay               the same gradients, in this process, with the kernel that each receipt names: how many
                         parameters come out different
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import farstep
from farstep_service.kernels import Kernels
from farstep_service.kernels.kernel import Rerun
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Store
from tests.benchmarks.hardware import hardware
from tests.benchmarks.peers.torch_rpc import Size
from tests.benchmarks.rows import Row, fact, plain, shown, within
from tests.benchmarks.sides import parameters_of
from tests.support.service.servers import running_server

SIZE, SMALLER = Size(25_000_000, 56), Size(2_500_000, 56)
AFTER = 3
"""Steps that are taken with the fused kernel."""
LIMIT_S = 120.0
ALLOWED = 3.0
"""How much longer the first step may take: memory is touched for the first time."""


@dataclass(frozen=True, slots=True)
class Step:
    """State what one step took, when it ended after the first one began, and which kernel ran it."""

    seconds: float
    ended_s: float
    kernel: str


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of a fresh server."""
    size = SMALLER if quick else SIZE
    return rows_of(f"first step, {size.parameters:,}, no kernel built", *first_steps(size))


def rows_of(work: str, steps: Sequence[Step], different: int) -> list[Row]:
    """Return what the steps and their replay came to."""
    later = [step.seconds for step in steps[1:] if step.kernel == steps[0].kernel]
    before = [step for step in steps if step.kernel != "fused"]
    rows = [shown(work, 1e3 * steps[0].seconds, "ms", f"{steps[0].kernel} kernel")]
    if later:
        rows = [within(work, 1e3 * steps[0].seconds, "ms", "a later one", 1e3 * median(later), ALLOWED)]
    if len(before) == len(steps):
        rows.append(fact("fused kernels take over", LIMIT_S, "s", "never did", "when they are ready", False))
    else:
        taken_s = steps[len(before)].ended_s
        rows.append(fact("fused kernels take over", taken_s, "s", f"after {len(before)} steps", "when ready", True))
    taken = f"{len(steps)} steps"
    return [*rows, fact("replay by recorded kernels", different, "different", taken, "none", not different)]


def first_steps(size: Size) -> tuple[list[Step], int]:
    """Take the steps, and return them with the number of parameters that a replay makes different."""
    with TemporaryDirectory() as directory, running_server(env={"FARSTEP_KERNEL_CACHE": directory}) as server:
        parameters = parameters_of(size)
        optimizer = farstep.optim.Adagrad(parameters, server=server.url)
        steps: list[Step] = []
        began = time.perf_counter()
        fused = 0
        while fused < AFTER and time.perf_counter() - began < LIMIT_S:
            start = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            assert optimizer.last_step is not None
            steps.append(Step(end - start, end - began, optimizer.last_step.kernel))
            fused += steps[-1].kernel == "fused"
        optimizer.close()
        replayed = replay(size, [step.kernel for step in steps], Path(directory))
        same = [torch.eq(ours, theirs) for ours, theirs in zip(parameters, replayed, strict=True)]
        return steps, sum(int((~each).sum()) for each in same)


def replay(size: Size, ran: Sequence[str], directory: Path) -> list[torch.Tensor]:
    """Return the parameters after the same steps with these kernels, from those that the server built."""
    parameters = parameters_of(size)
    layout = Layout.build(SegmentSpec(str(place), (length,), "float32") for place, length in enumerate(size.lengths))
    rule = RULES["Adagrad"]
    hypers = [rule.hyper.from_options({})]
    memory = FlatBuffers(layout).copy_(BorrowedBuffers(layout, [each.detach() for each in parameters]))
    store = Store(layout, rule, hypers, kernels=Kernels(directory=directory), parameters=memory)
    gradients = Gradients(BorrowedBuffers(layout, [each.grad for each in parameters]))
    for kernel in ran:
        wanted: Literal["fused", "reference"] = "fused" if kernel == "fused" else "reference"
        store.apply(hypers, gradients, rerun=Rerun(wanted))
    with store.hold() as held:
        return [held.buffers.segment(index).clone() for index in range(size.tensors)]


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    print(hardware())
    print(plain(measure(quick=False)))


if __name__ == "__main__":
    main()
