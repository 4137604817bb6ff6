"""Measure update kernels against torch.optim.

    make bench        or        python tests/benchmarks/bench_kernels.py [--sizes 25M,250k,2500] [--json]

All sides run in turn within each round, on the same number of threads; the table shows medians in microseconds.

    loop, foreach, fused     torch.optim's implementations (fused: Adagrad, SGD, Adam, AdamW)
    compiled                 torch.compile(optimizer.step), which compiles for seconds; asked for by --compiled
    embedded                 a store over the user's own tensors, fused kernels: the heart of an embedded session
    reference                the same with reference kernels: what runs until the fused ones are built
    server                   a store over its own flat memory, in place: what a session's step costs on a server
    held                     the same while somebody holds the version before
    of best                  embedded over the best of torch's
    of copy                  bytes the rule must read and write per second on the server, over those of `b.copy_(a)`
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from farstep_service.kernels import Kernels
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Store
from tests.benchmarks.rows import Row, faster, gained


@dataclass(frozen=True)
class Size:
    """A model of equal tensors, and how many rounds are enough."""

    elements: int
    tensors: int
    rounds: int


SIZES = {"25M": Size(25_000_000, 56, 7), "250k": Size(250_000, 60, 200), "2500": Size(2_500, 6, 500)}

BYTES = {"ASGD": 4 * 4, "SGD": 3 * 4}
"""Bytes per element that a rule must read and write, if not p, g and its state in, and p and its state out: ASGD need
not read its average before averaging starts."""
ELEMENTWISE = tuple(name for name, rule in RULES.items() if "fused" in rule.kernels)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ELEMENTWISE},
    "SGD momentum": ("SGD", {"momentum": 0.9}),
    "Adam amsgrad": ("Adam", {"amsgrad": True}),
    "RMSprop both": ("RMSprop", {"momentum": 0.9, "centered": True}),
}
"""What is measured: each rule with its defaults, and with what costs it more memory."""
FUSED = ("Adagrad", "SGD", "Adam", "AdamW")
"""What torch has a fused implementation of on CPUs."""
TORCHS = ("loop", "foreach", "fused", "compiled")
FASTER = {"Adadelta": 5.0, "Adamax": 2.0, "ASGD": 1.4, "Adagrad": 1.0, "Adam": 1.0, "AdamW": 1.0, "SGD": 1.0}
"""How many times as fast as torch's for-loop, foreach and fused ones each is to be; the others have no target."""
OF_COPY = 1.4

Step = Callable[[], object]


def settle_heap() -> None:
    """Let glibc keep what is freed, as in a process that has trained: freeing a large block raises its thresholds.

    In a process that has done nothing yet, the temporaries of torch.optim go back to the kernel each time and come in
    page faults, and its for-loop takes up to three times as long.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of each elementwise optimizer: against torch's eager ones, its compiled one, and a copy."""
    settle_heap()
    size, kernels = SIZES["25M"], Kernels("fused")
    rows: list[Row] = []
    for name in FASTER if quick else ELEMENTWISE:
        compiled = not quick and name in FASTER
        sides = sides_of(name, {}, size, kernels, ours=("server",), compiled=compiled)
        rows += rows_of(name, medians(sides, 3 if quick else size.rounds))
    return rows


def rows_of(name: str, times_us: Mapping[str, float]) -> Iterator[Row]:
    """Return what was measured of an optimizer at 25 M, compared."""
    work, ours = f"{name} kernel, 25,000,000 in 56", times_us["server"] / 1e3
    best = best_of(times_us)
    yield faster(work, ours, "ms", f"torch.optim, {best}", times_us[best] / 1e3, FASTER.get(name))
    if "compiled" in times_us:
        yield faster(work, ours, "ms", "torch.optim, compiled", times_us["compiled"] / 1e3, None)
    gb = SIZES["25M"].elements / 1e9
    bytes_per_s = gb * bytes_of(name, {}) / times_us["server"] * 1e6
    yield gained(f"{name} kernel, bytes", bytes_per_s, "GB/s", "copy_", gb * 8 / times_us["copy"] * 1e6, OF_COPY)


def best_of(times_us: Mapping[str, float]) -> str:
    """Return the fastest side of torch's that compiles nothing."""
    return min((side for side in TORCHS[:3] if side in times_us), key=lambda side: times_us[side])


def bytes_of(name: str, options: Mapping[str, Any]) -> int:
    """Return the bytes that a rule must read and write for each float32 element."""
    rule = RULES[name]
    state = len(rule.fields(rule.optional(rule.hyper.from_options(options))))
    return 4 * (3 + 2 * state) if options else BYTES.get(name, 4 * (3 + 2 * state))


def sides_of(
    name: str,
    options: dict[str, Any],
    size: Size,
    kernels: Kernels,
    *,
    ours: Sequence[str] = ("embedded", "reference", "server", "held"),
    compiled: bool = False,
    device: str = "cpu",
) -> dict[str, Step]:
    """Return a step of each side."""
    shapes = [(size.elements // size.tensors,)] * size.tensors
    rule = RULES[name]
    hypers = [rule.hyper.from_options(options)]
    layout = Layout.build(SegmentSpec(str(index), shape, "float32") for index, shape in enumerate(shapes))
    grads = [torch.randn(shape, device=device) for shape in shapes]

    def parameters() -> list[torch.Tensor]:
        params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return params

    def theirs(**how: bool) -> Step:
        step: Step = getattr(torch.optim, name)(parameters(), **options, **how).step
        return step

    def embedded(kernel: str) -> Step:
        params = parameters()
        source = kernels if kernel == "fused" else Kernels("reference")
        memory = BorrowedBuffers(layout, params, device=device)
        store = Store(layout, rule, hypers, kernels=source, device=device, parameters=memory)
        lent = BorrowedBuffers(layout, device=device)

        def step() -> None:
            lent.lend([p.grad for p in params])
            store.apply(hypers, Gradients(lent))

        return step

    def server(*, held: bool) -> Step:
        store = Store(layout, rule, hypers, kernels=kernels, device=device)
        gradients = Gradients(FlatBuffers(layout, device).copy_(BorrowedBuffers(layout, grads, device=device)))

        def step() -> None:
            if held:
                with store.hold():
                    store.apply(hypers, gradients)
            else:
                store.apply(hypers, gradients)

        return step

    makes: dict[str, Callable[[], Step]] = {
        "embedded": lambda: embedded("fused"),
        "reference": lambda: embedded("reference"),
        "server": lambda: server(held=False),
        "held": lambda: server(held=True),
    }
    source, into = torch.randn(size.elements, device=device), torch.randn(size.elements, device=device)
    sides = {"loop": theirs(foreach=False), "foreach": theirs(foreach=True)}
    if name in FUSED and _runs(fused := theirs(fused=True)):
        sides["fused"] = fused
    if compiled:
        torch._logging.set_logs(  # type: ignore[attr-defined]
            dynamo=logging.ERROR, inductor=logging.ERROR
        )
        sides["compiled"] = torch.compile(theirs(), fullgraph=False)
    return sides | {side: makes[side]() for side in ours} | {"copy": lambda: into.copy_(source)}


def _runs(step: Step) -> bool:
    """Return whether torch has this for the device; it says so at the first step."""
    try:
        step()
    except NotImplementedError:
        return False
    return True


def medians(sides: Mapping[str, Step], rounds: int, finish: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Return the median of each side in microseconds.

    Args:
        sides: what is measured.
        rounds: timed ones; three more go before them.
        finish: waits for the device.
    """
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 3):
        for side, step in sides.items():
            finish()
            began = time.perf_counter()
            step()
            finish()
            if number >= 3:
                times[side].append((time.perf_counter() - began) * 1e6)
    return {side: statistics.median(each) for side, each in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rules", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args(arguments)
    torch.set_num_threads(told.threads)
    settle_heap()
    kernels = Kernels("fused")
    columns = (*TORCHS, "embedded", "reference", "server", "held", "copy")
    if not told.json:
        print(f"torch {torch.__version__}, {told.threads} thread(s), float32, medians in microseconds")
        print(f"{'':>5} {'':>12}" + "".join(f"{column:>10}" for column in columns) + "   of best   of copy")
    for label in told.sizes.split(","):
        for case in told.rules.split(","):
            name, options = CASES[case]
            found = medians(sides_of(name, options, SIZES[label], kernels, compiled=told.compiled), SIZES[label].rounds)
            ratios = {
                "of best": found["embedded"] / found[best_of(found)],
                "of copy": bytes_of(name, options) / found["server"] * found["copy"] / 8,
            }
            if told.json:
                print(json.dumps({"size": label, "rule": case, "threads": told.threads, **found, **ratios}), flush=True)
                continue
            cells = "".join(f"{found[column]:>10.0f}" if column in found else f"{'':>10}" for column in columns)
            print(f"{label:>5} {case:>12}{cells}" + "".join(f"{ratio:>10.2f}" for ratio in ratios.values()), flush=True)


if __name__ == "__main__":
    main()
