"""The time inside of `step()` with pushes that begin during the backward pass, and without, in one run.

    make bench        or        python tests/benchmarks/bench_overlap.py [--cycles 5]

A perceptron of equal layers is trained by a remote Adagrad over TCP loopback, worker and server in processes of their
own, one torch thread each. The batch is chosen so that a backward pass takes at least as long as the push: overlap is
for such models, and cannot hide more of a push than there is of a backward pass. Columns, in milliseconds (medians):

    backward   the backward pass by itself, and with gradients being sent during it
    step       `optimizer.step()`, without overlap and with it
    push       the part of `step()` that could be hidden: as the server saw it, from the head to the last gradient
    hidden     the share of it that no longer is in `step()`
    both       backward pass and step together, with overlap, to without: what a training gains

The two take turns within each cycle, a few steps each, so that a machine whose speed drifts does not favour one. On two
cores three busy threads (backward pass, sender, server) share what the machine has, which a network would not ask for.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

import farstep
from farstep.overlap import STREAMED
from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, gained
from tests.support.service.servers import running_server

WIDTH = 1024
SIZES = ((3, 256), (5, 256), (10, 256))
"""Layers, and the batch that makes their backward pass long enough."""
STEPS = 12
WARM_UP = 3
TARGET = 0.8


@dataclass
class Side:
    """A training, and what its steps took, in seconds."""

    network: nn.Module
    optimizer: farstep.optim.Adagrad
    backward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    push: list[float] = field(default_factory=list)
    streamed: int = 0

    def train(self, inputs: Tensor, classes: Tensor, *, overlap: bool) -> None:
        """Take steps and time them, but for the first ones."""
        for place in range(STEPS + WARM_UP):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.network(inputs), classes)
            began = time.perf_counter()
            torch.autograd.backward(loss)
            computed = time.perf_counter()
            self.optimizer.step()
            ended = time.perf_counter()
            report = self.optimizer.last_step
            assert report is not None
            if place < WARM_UP:
                continue
            self.backward.append(computed - began)
            self.step.append(ended - computed)
            self.push.append(report.seconds["receive"])
            self.streamed += report.overlap == STREAMED
            assert overlap or not report.overlap


def network_of(layers: int) -> nn.Sequential:
    """Return equal layers, the same at each call."""
    torch.manual_seed(0)
    members = [module for _ in range(layers) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*members, nn.Linear(WIDTH, 10))


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the row of each network: the share of a push that overlapping hides."""
    rows = []
    with running_server() as server:
        for layers, batch in SIZES[-1:] if quick else SIZES:
            sides = train_both(server.url, layers, batch, 1 if quick else 5)
            step = {overlap: 1e3 * median(side.step) for overlap, side in sides.items()}
            count = sum(each.numel() for each in sides[True].network.parameters())
            push, hidden = 1e3 * median(sides[False].push), step[False] - step[True]
            rows.append(gained(f"overlap, {count:,}, hidden", hidden, "ms", "a push", push, TARGET))
    return rows


def train_both(url: str, layers: int, batch: int, cycles: int) -> dict[bool, Side]:
    """Return both sides after their steps, by whether they overlap."""
    torch.manual_seed(1)
    inputs, classes = torch.randn(batch, WIDTH), torch.randint(10, (batch,))
    sides: dict[bool, Side] = {}
    for overlap in (False, True):
        network = network_of(layers)
        optimizer = farstep.optim.Adagrad(network.parameters(), lr=1e-3, server=url, kernel="fused", overlap=overlap)
        sides[overlap] = Side(network, optimizer)
    for _ in range(cycles):
        for overlap, side in sides.items():
            side.train(inputs, classes, overlap=overlap)
    for side in sides.values():
        side.optimizer.close()
    return sides


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5, help="how often the sides take turns")
    cycles = parser.parse_args(arguments).cycles
    torch.set_num_threads(1)
    print(hardware())
    print(
        f"{'parameters':>22} {'backward':>9} {'(overlap)':>9} {'step':>9} {'(overlap)':>9} {'push':>9} {'hidden':>7} "
        f"{'both':>6}  target: {TARGET:.0%} hidden"
    )
    with running_server() as server:
        for layers, batch in SIZES:
            sides = train_both(server.url, layers, batch, cycles)
            parameters = sides[True].network.parameters()
            label = f"{sum(p.numel() for p in parameters):,} in {2 * layers + 2}"
            times = {
                (name, overlap): 1e3 * median(getattr(side, name))
                for overlap, side in sides.items()
                for name in ("backward", "step", "push")
            }
            gain = times["step", False] - times["step", True]
            push = times["push", False]
            together = [times["backward", overlap] + times["step", overlap] for overlap in (False, True)]
            columns = " ".join(
                f"{times[key]:>9.2f}"
                for key in (("backward", False), ("backward", True), ("step", False), ("step", True), ("push", False))
            )
            streamed = sides[True].streamed / len(sides[True].step)
            print(
                f"{label:>22} {columns} {gain / push:>7.0%} {together[1] / together[0]:>5.2f}x  {streamed:.0%} streamed"
            )


if __name__ == "__main__":
    main()
