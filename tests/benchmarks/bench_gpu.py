"""The kernels and a step on a GPU, where there is one.

    make bench        or        python tests/benchmarks/bench_gpu.py

    kernels      each elementwise optimizer, 25 M float32 parameters in 56 tensors on the device: the bytes that the
                 rule must read and write per second, against those of a copy on the device; and the time, against
                 torch.optim's for-loop, foreach, fused and compiled
    a step       `optimizer.step()` of a model in the host's memory with a session on the device, in shared memory and
                 over TCP, against the same bytes through PCIe alone, from pinned memory and back to it

The device is waited for before and after each step. Target: 85 % of the copy, faster than each of torch's; the step in
shared memory at most twice PCIe alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from farstep_service.kernels import Kernels
from tests.benchmarks.bench_kernels import ELEMENTWISE, SIZES, TORCHS, bytes_of, medians, sides_of
from tests.benchmarks.hardware import hardware
from tests.benchmarks.peers.torch_rpc import Size
from tests.benchmarks.rows import Row, absent, faster, gained, plain, within
from tests.benchmarks.sides import Work, remote_steps
from tests.support.service.servers import running_server

DEVICE = "cuda:0"
OF_COPY = 0.85
OF_PCIE = 2.0
ROUNDS = 30


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of this machine's GPU, or one that says that there is none."""
    if not torch.cuda.is_available():
        return [absent("kernels on a GPU, and a step from host to host", "no GPU here")]
    kernels = Kernels("fused")
    names = ("Adagrad", "Adadelta") if quick else ELEMENTWISE
    rows = [row for name in names for row in _kernel_rows(name, kernels, compiled=not quick)]
    return [*rows, *_step_rows(Work(Size(25_000_000, 56), 5 if quick else 15))]


def _kernel_rows(name: str, kernels: Kernels, *, compiled: bool) -> Iterator[Row]:
    size = SIZES["25M"]
    sides = sides_of(name, {}, size, kernels, ours=("server",), compiled=compiled, device=DEVICE)
    times_us = medians(sides, ROUNDS, torch.cuda.synchronize)
    gb, ours = size.elements / 1e9, times_us["server"]
    of_copy = gb * 8 / times_us["copy"] * 1e6
    work = f"{name} kernel on {torch.cuda.get_device_name(DEVICE)}"
    yield gained(f"{work}, bytes", gb * bytes_of(name, {}) / ours * 1e6, "GB/s", "device copy", of_copy, OF_COPY)
    for side in TORCHS:
        if side in times_us:
            yield faster(work, ours, "µs", f"torch.optim, {side}", times_us[side], 1)


def _step_rows(work: Work) -> Iterator[Row]:
    pcie = pcie_ms(work.size.parameters, work.rounds)
    with TemporaryDirectory() as directory, running_server("--unix", f"{directory}/s", "--device", DEVICE) as server:
        for how, url, limit in (("shared memory", server.unix, OF_PCIE), ("TCP", server.url, None)):
            step = 1e3 * median(remote_steps(url, work)[0])
            yield within(f"{work.label}, host to host by {how}", step, "ms", "PCIe alone", pcie, limit)


def pcie_ms(elements: int, rounds: int) -> float:
    """Return the median milliseconds of so many float32 to the device and back."""
    there = torch.randn(elements).pin_memory()
    back, device = torch.empty_like(there).pin_memory(), torch.empty(elements, device=DEVICE)
    seconds = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(there, non_blocking=True)
        back.copy_(device, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1e3 * median(seconds[2:])


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    print(hardware())
    print(plain(measure(quick=False)))


if __name__ == "__main__":
    main()
