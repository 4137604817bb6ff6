"""What a session's policy adds to a step: clipping, accumulation, the average, and a look at a sum of gradients.

    make bench        or        python tests/benchmarks/bench_policies.py

One step of a session of 25 million float32 parameters in 161 tensors with fused AdamW, without a network, beside the
same step without a policy, on one thread. The two take turns, and what is told is the median of the differences of
neighbours. Gradients are in memory that is not ours, as in an embedded session or in shared memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from farstep_service.kernels import Kernels
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.store import FlatBuffers, Gradients
from farstep_service.tensors import Steps, state_of
from farstep_service.tensors.finite import first_nonfinite_in
from tests.benchmarks.hardware import hardware

TENSORS, ELEMENTS = 161, 25_000_000
WARM_UP, REPEATED = 3, 15
KERNELS = Kernels("fused")
POLICIES: dict[str, dict[str, object]] = {
    "clip_norm, not reached": {"clip_norm": 1e9},
    "clip_norm, reached": {"clip_norm": 1.0},
    "clip_norm of infinity, reached": {"clip_norm": 1.0, "clip_norm_type": "inf"},
    "clip_value": {"clip_value": 0.5},
    "ema": {"ema": 0.999},
}


def session(**policy: object) -> Steps:
    plan = Plan.build(
        name="s",
        optimizer="AdamW",
        groups=[{"lr": 1e-3}],
        segments=[SegmentSpec(f"p{index}", (ELEMENTS // TENSORS,), "float32") for index in range(TENSORS)],
        consistency={"mode": "async"},
        nonfinite="refuse",
        kernel="fused",
        policy=policy,
    )
    state = state_of(plan, kernels=KERNELS, device=torch.device("cpu"))
    state.adopt(drawn(plan))
    return Steps(state)


def drawn(plan: Plan) -> FlatBuffers:
    buffers = FlatBuffers(plan.layout)
    for flat in buffers.flat.values():
        flat.normal_()
    return buffers


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    torch.set_num_threads(1)
    print(hardware())
    print(f"{ELEMENTS:,} parameters in {TENSORS} tensors, one thread; milliseconds, medians")
    plain = session()
    plan = plain.plan
    gradients = Gradients(drawn(plan), borrowed=True)  # so that what is clipped once is not clipped for good

    def step(steps: Steps) -> Callable[[], object]:
        return lambda: steps.take(gradients, ("w0",), {}, checked=True)

    def compare(name: str, other: Callable[[], object]) -> None:
        for _ in range(WARM_UP):
            plain_step()
            other()
        pairs = [(timed(plain_step), timed(other)) for _ in range(REPEATED)]
        print(f"{name:32} {median(b - a for a, b in pairs):+8.1f}")

    plain_step = step(plain)
    for _ in range(WARM_UP):
        plain_step()
    print(f"{'a step without a policy':32} {median(timed(plain_step) for _ in range(REPEATED)):8.1f}")
    for name, policy in POLICIES.items():
        compare(name, step(session(**policy)))
    looked = step(plain)
    compare("looking at a sum", lambda: (first_nonfinite_in(gradients), looked()))
    rounds = session(accumulate=1_000_000)
    rounds.take(Gradients(drawn(plan)), ("w0",), {}, checked=True)
    added = step(rounds)
    for _ in range(WARM_UP):
        added()
    print(f"{'a round that is added up':32} {median(timed(added) for _ in range(REPEATED)):8.1f}")


if __name__ == "__main__":
    main()
