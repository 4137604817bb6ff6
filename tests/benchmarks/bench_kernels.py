"""Measure update kernels against torch.optim.

    python tests/benchmarks/bench_kernels.py [--sizes 25M,250k,2500] [--json]

All sides run in turn within each round, on the same number of threads; the table shows medians in microseconds.

    loop, foreach, fused     torch.optim's implementations (fused: Adagrad, SGD, Adam, AdamW)
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
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES, Kernels
from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Store


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
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name, rule in RULES.items() if "fused" in rule.kernels},
    "SGD momentum": ("SGD", {"momentum": 0.9}),
    "Adam amsgrad": ("Adam", {"amsgrad": True}),
    "RMSprop both": ("RMSprop", {"momentum": 0.9, "centered": True}),
}
"""What is measured: each rule with its defaults, and with what costs it more memory."""
FUSED = ("Adagrad", "SGD", "Adam", "AdamW")
"""What torch has a fused implementation of on CPUs."""


def sides_of(name: str, options: dict[str, Any], size: Size, kernels: Kernels) -> dict[str, Callable[[], object]]:
    """Return a step of each side."""
    shapes = [(size.elements // size.tensors,)] * size.tensors
    rule = RULES[name]
    hypers = [rule.hyper.from_options(options)]
    layout = Layout.build(SegmentSpec(str(index), shape, "float32") for index, shape in enumerate(shapes))
    grads = [torch.randn(shape) for shape in shapes]

    def parameters() -> list[torch.Tensor]:
        params = [torch.randn(shape).requires_grad_() for shape in shapes]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return params

    def theirs(**how: bool) -> Callable[[], object]:
        step: Callable[[], object] = getattr(torch.optim, name)(parameters(), **options, **how).step
        return step

    def embedded(kernel: str) -> Callable[[], object]:
        params = parameters()
        source = kernels if kernel == "fused" else Kernels("reference")
        store = Store(layout, rule, hypers, kernels=source, parameters=BorrowedBuffers(layout, params))
        lent = BorrowedBuffers(layout)

        def step() -> None:
            lent.lend([p.grad for p in params])
            store.apply(hypers, Gradients(lent))

        return step

    def server(*, held: bool) -> Callable[[], object]:
        store = Store(layout, rule, hypers, kernels=kernels)
        gradients = Gradients(FlatBuffers(layout).copy_(BorrowedBuffers(layout, grads)))

        def step() -> None:
            if held:
                with store.hold():
                    store.apply(hypers, gradients)
            else:
                store.apply(hypers, gradients)

        return step

    source, into = torch.randn(size.elements), torch.randn(size.elements)
    sides = {"loop": theirs(foreach=False), "foreach": theirs(foreach=True)}
    if name in FUSED:
        sides["fused"] = theirs(fused=True)
    return sides | {
        "embedded": embedded("fused"),
        "reference": embedded("reference"),
        "server": server(held=False),
        "held": server(held=True),
        "copy": lambda: into.copy_(source),
    }


def measure(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median of each side in microseconds."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 3):
        for side, step in sides.items():
            began = time.perf_counter()
            step()
            if number >= 3:
                times[side].append((time.perf_counter() - began) * 1e6)
    return {side: statistics.median(each) for side, each in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rules", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    kernels = Kernels("fused")
    columns = ("loop", "foreach", "fused", "embedded", "reference", "server", "held", "copy")
    if not told.json:
        print(f"torch {torch.__version__}, {told.threads} thread(s), float32, medians in microseconds")
        print(f"{'':>5} {'':>12}" + "".join(f"{column:>10}" for column in columns) + "   of best   of copy")
    for label in told.sizes.split(","):
        for case in told.rules.split(","):
            name, options = CASES[case]
            found = measure(sides_of(name, options, SIZES[label], kernels), SIZES[label].rounds)
            rule = RULES[name]
            state = len(rule.fields(rule.optional(rule.hyper.from_options(options))))
            moved = BYTES.get(case, 4 * (3 + 2 * state))
            best = min(found[side] for side in ("loop", "foreach", "fused") if side in found)
            ratios = {
                "of best": found["embedded"] / best,
                "of copy": moved / found["server"] * found["copy"] / 8,
            }
            if told.json:
                print(json.dumps({"size": label, "rule": case, "threads": told.threads, **found, **ratios}), flush=True)
                continue
            cells = "".join(f"{found[column]:>10.0f}" if column in found else f"{'':>10}" for column in columns)
            print(f"{label:>5} {case:>12}{cells}" + "".join(f"{ratio:>10.2f}" for ratio in ratios.values()), flush=True)


if __name__ == "__main__":
    main()
