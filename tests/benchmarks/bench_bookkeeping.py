"""What a remote step costs beside the network: hooks, groups, changed options, and the search for edits.

    make bench        or        python tests/benchmarks/bench_bookkeeping.py

The step is that of a whole optimizer on a server, but its link takes the gradients and does nothing. It keeps what a
real one keeps to compare the parameters with, and nothing was edited. Medians in microseconds, on one thread, beside
the same step with a search that looks at nothing. Target: at most 150 microseconds for 300 small parameters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from farstep.heartbeat import Heartbeat
from farstep.link import Link, Options, Parameter, SessionSpec, Start
from farstep.optim import Adagrad, Adam, RemoteOptimizer
from farstep.protocol.consistency import Async, Consistency
from farstep.protocol.fields import FieldKind, State
from farstep.protocol.messages import Evaluation
from farstep.protocol.receipt import StepReport
from farstep.settings import WorkerSettings
from farstep.tensors import ParameterReceiver
from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, within

SIZES = ((3_000, 300), (250_000, 300), (2_500_000, 300), (25_000_000, 56))
GROUPS = (1, 4)
WARM_UP = 5
BUDGET_US = 150.0


class NoLink(Link):
    def options_in_force(self):
        return []

    """A link that has all answers already."""

    def __init__(
        self, spec: SessionSpec, parameters: Sequence[Tensor], settings: WorkerSettings, start: Start | None = None
    ):
        self._arrivals = ParameterReceiver(parameters)
        self._arrivals.keep_()
        self._parameters = parameters
        self._version = 0
        self._consistency: Consistency = Async()

    @property
    def version(self) -> int:
        return self._version

    @property
    def durability(self) -> str:
        return "none"

    @property
    def consistency(self) -> Consistency:
        return self._consistency

    def set_consistency(self, mode: Consistency) -> None:
        self._consistency = mode

    def heartbeat(self, *, once: bool = False) -> Heartbeat:
        raise AssertionError("nothing took long")

    @property
    def fields(self) -> Mapping[str, FieldKind]:
        return {}

    @property
    def has_initial_state(self) -> bool:
        return False

    def push(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None = None,
    ) -> StepReport:
        self._version += 1
        return StepReport(version=self._version)

    def skip(self, groups: Mapping[int, Options]) -> StepReport:
        raise AssertionError("nothing overflowed")

    def pull(self) -> int:
        return self._version

    def write(self, parameters: Sequence[int] = (), state: Mapping[int, State | None] | None = None) -> int:
        raise AssertionError("nothing was edited")

    def append(self, options: Options, parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> bool:
        raise AssertionError("nothing was added")

    def read_view(self, view: str) -> list[Tensor]:
        raise AssertionError("nothing was averaged")

    def write_view(self, view: str, values: Sequence[Tensor]) -> None:
        raise AssertionError("nothing was averaged")

    def edited(self, addresses: list[int]) -> list[int]:
        return self._arrivals.edited(addresses)

    def stand_in(self, index: int) -> Tensor | None:
        raise AssertionError("nothing was away")

    def rebind(self, parameters: Sequence[Tensor]) -> bool:
        raise AssertionError("nothing was replaced")

    def stateful(self) -> tuple[int, list[bool]]:
        return self._version, [False] * len(self._parameters)

    def read_state(self, indices: Sequence[int]) -> list[State | None]:
        return [None for _ in indices]

    def rejoin(self, start: Start) -> bool:
        return True

    def close(self) -> None:
        """Leave nothing behind."""


class Blind(NoLink):
    """The same, which does not look for edits."""

    def edited(self, addresses: list[int]) -> list[int]:
        return []


def optimizer_of(kind: type[RemoteOptimizer], elements: int, tensors: int, groups: int) -> dict[str, RemoteOptimizer]:
    """Return an optimizer for each link, over parameters with gradients."""
    made = {}
    for link in (NoLink, Blind):
        parameters = [torch.nn.Parameter(torch.randn(elements // tensors)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        named = type(kind.__name__, (kind,), {"opened_by": staticmethod(link)})
        made[link.__name__] = named([{"params": parameters[i::groups], "lr": 0.1 / (i + 1)} for i in range(groups)])
    return made


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the row of 300 small parameters."""
    elements, tensors = SIZES[0]
    ours = medians(optimizer_of(Adagrad, elements, tensors, 1), 300)["NoLink"]
    return [within(f"step without a network, {elements:,} in {tensors}", ours, "µs", "the budget", BUDGET_US, 1)]


def medians(sides: Mapping[str, RemoteOptimizer], rounds: int) -> dict[str, float]:
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
    print(hardware())
    print(f"{'optimizer':>9} {'parameters':>20} {'groups':>6} {'step':>9} {'no search':>9}")
    for kind in (Adagrad, Adam):
        for elements, tensors in SIZES:
            for groups in GROUPS:
                times = medians(optimizer_of(kind, elements, tensors, groups), 30 if elements > 10**7 else 300)
                label = f"{elements:,} in {tensors}"
                print(f"{kind.__name__:>9} {label:>20} {groups:>6} {times['NoLink']:>9.1f} {times['Blind']:>9.1f}")


if __name__ == "__main__":
    main()
