"""An embedded step against every variant torch.optim has of the same optimizer, in one run.

    make bench        or        python tests/benchmarks/bench_embedded.py

Each side is `optimizer.step()` of a whole optimizer object, on one thread, in turn within each round; medians in
microseconds. torch has a fused variant for Adagrad only. Target: at most 1.1 times the best of torch's, 1.3
times for 2,500 parameters.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import farstep
from tests.benchmarks.bench_kernels import settle_heap
from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, within

SIZES = ((25_000_000, 56, 7), (250_000, 60, 60), (2_500, 6, 400))
NAMES = ("Adagrad", "Adadelta", "Adamax", "ASGD")
ALLOWED = {25_000_000: 1.1, 250_000: 1.1, 2_500: 1.3}
WARM_UP = 2


def parameters_of(elements: int, tensors: int) -> list[torch.nn.Parameter]:
    """Return parameters with gradients, equal ones at each call."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(elements // tensors, generator=generator)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def sides_of(name: str, elements: int, tensors: int) -> dict[str, torch.optim.Optimizer]:
    """Return an optimizer of each side over parameters of its own."""
    torchs = getattr(torch.optim, name)
    sides: dict[str, torch.optim.Optimizer] = {
        "loop": torchs(parameters_of(elements, tensors), foreach=False),
        "foreach": torchs(parameters_of(elements, tensors), foreach=True),
    }
    if name == "Adagrad":
        sides["fused"] = torchs(parameters_of(elements, tensors), fused=True)
    sides["farstep"] = getattr(farstep.optim, name)(parameters_of(elements, tensors), kernel="fused")
    return sides


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of each optimizer, at each size."""
    settle_heap()
    rows = []
    for name in NAMES[:1] if quick else NAMES:
        for elements, tensors, rounds in SIZES:
            times = medians(sides_of(name, elements, tensors), rounds)
            ours = times.pop("farstep")
            best = min(times, key=lambda side: times[side])
            work = f"embedded {name}, {elements:,} in {tensors}"
            rows.append(within(work, ours / 1e3, "ms", f"torch.optim, {best}", times[best] / 1e3, ALLOWED[elements]))
    return rows


def medians(sides: dict[str, torch.optim.Optimizer], rounds: int) -> dict[str, float]:
    """Return the median microseconds of a step of each side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for place in range(rounds + WARM_UP):
        for side, optimizer in sides.items():
            began = time.perf_counter()
            optimizer.step()
            if place >= WARM_UP:
                times[side].append(time.perf_counter() - began)
    return {side: 1e6 * median(each) for side, each in times.items()}


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    settle_heap()
    print(hardware())
    print(f"{'optimizer':>9} {'parameters':>20} {'loop':>9} {'foreach':>9} {'fused':>9} {'farstep':>9} {'to best':>8}")
    for name in NAMES:
        for elements, tensors, rounds in SIZES:
            times = medians(sides_of(name, elements, tensors), rounds)
            ours = times.pop("farstep")
            theirs = " ".join(f"{times.get(side, float('nan')):>9.1f}" for side in ("loop", "foreach", "fused"))
            label = f"{elements:,} in {tensors}"
            print(f"{name:>9} {label:>20} {theirs} {ours:>9.1f} {ours / min(times.values()):>7.2f}x")


if __name__ == "__main__":
    main()
