"""The same training twice, once with a server that is killed: parameters, state and averages end with the same bits.

A comparison of all state finds what a ledger does not: momentum that was lost or counted twice, a step counter that
went back, a learning rate that a scheduler had sent and that is forgotten, a round that was half accumulated, a push
that had reached a barrier. Each training is one whose result does not depend on who comes first, in one of the modes,
and has a scheduler, clipping, accumulation and an average on.

The workers are threads of this process; the server is a process, and is killed with SIGKILL.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from farstep.optim import RemoteOptimizer
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync
from farstep.settings import RemoteOptions
from tests.support.client import rounds
from tests.support.client.twins import drawn, ours, parameters
from tests.support.service.servers import RunningServer

SHAPES: Final = ((5, 3), (3,), (), (17,))
LARGE: Final = ((300, 200), (7,))
STEPS: Final = 96
"""Pushes of each worker."""
SILENT_S: Final = 90.0
AFTER_S: Final = 0.01
"""How long after a step the server is killed at most: anywhere in the next one, or the one after it."""
FACTOR: Final = 0.98
POLICY: Final[RemoteOptions] = {"clip_norm": 0.7, "accumulate": 2, "ema": 0.9}


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        optimizer: its name; "" for rounds of local steps.
        mode, workers: a mode in which that many workers always have the same result.
        options: torch's.
        policy: the session's.
        make: what makes the rounds.
        steps: pushes of each worker.
        shapes: of the parameters; large gradients are received straight into the journal.
    """

    optimizer: str
    mode: Consistency
    workers: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    policy: RemoteOptions = field(default_factory=lambda: POLICY)
    make: rounds.Open = rounds.local_sgd
    steps: int = STEPS
    shapes: Sequence[Sequence[int]] = SHAPES


PAIR: Final = Sync(workers=2, deadline_s=60.0)
CASES: Final[dict[str, Case]] = {
    "sync Adam": Case("Adam", PAIR, 2, {"lr": 0.05}),
    "async Adagrad": Case("Adagrad", Async(), 1, {"lr": 0.1}),
    "bounded Adam": Case("Adam", Bounded(staleness=1), 1, {"lr": 0.05, "amsgrad": True}),
    "compensated Adagrad": Case("Adagrad", Async(delay_compensation=0.5), 1, {"lr": 0.1}),
    "LocalSGD": Case("", PAIR, 2, policy={"clip_norm": 5.0, "ema": 0.9}),
    "DiLoCo": Case("", PAIR, 2, policy={"ema": 0.9}, make=rounds.diloco),
    "sync Adagrad": Case("Adagrad", Sync(workers="live", deadline_s=60.0), 2, {"lr": 0.1}),
    "large Adam": Case("Adam", PAIR, 2, {"lr": 0.05}, steps=48, shapes=LARGE),
    "sync SGD": Case("SGD", PAIR, 2, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}
"""The trainings by name."""


class Steps:
    """Count the steps that workers were told of, and let another thread wait for some number of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def note(self) -> None:
        """Count one."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def reach(self, count: int, within_s: float) -> bool:
        """Wait until there are so many, and return whether there are."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count >= count, within_s)


@dataclass
class Ended:
    """What one worker has at the end of a training, and what it was told on the way."""

    versions: list[int]
    reasons: list[str]
    parameters: list[Tensor]
    bits: list[tuple[str, Any]]

    def differences(self, other: Ended) -> list[str]:
        """Return where another one has something else."""
        wrong = [] if self.versions == other.versions else [f"versions {self.versions} and {other.versions}"]
        if self.reasons != other.reasons:
            wrong.append(f"reasons {self.reasons} and {other.reasons}")
        pairs = zip(self.parameters, other.parameters, strict=True)
        wrong += [f"parameter {index}" for index, (one, its) in enumerate(pairs) if not torch.equal(one, its)]
        if [key for key, _ in self.bits] != [key for key, _ in other.bits]:
            return [*wrong, "what its state has"]
        wrong += [key for (key, one), (_, its) in zip(self.bits, other.bits, strict=True) if not _same(one, its)]
        return wrong


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def train(url: str, session: str, case: Case, remote: RemoteOptions, steps: Steps) -> list[Ended]:
    """Train with all workers of a case, and return what each has at the end, in their order."""
    place: RemoteOptions = {
        **case.policy,
        "server": url,
        "session": session,
        "consistency": case.mode,
        "kernel": "reference",
        **remote,
    }
    begun = threading.Barrier(case.workers)
    work: Callable[..., Ended] = _steps if case.optimizer else _rounds
    with ThreadPoolExecutor(case.workers) as threads:
        running = [threads.submit(work, case, place, number, begun, steps) for number in range(case.workers)]
        return [each.result() for each in running]


def _steps(case: Case, place: RemoteOptions, number: int, begun: threading.Barrier, steps: Steps) -> Ended:
    own = parameters(drawn(0, case.shapes))
    optimizer = ours(case.optimizer)(own, foreach=False, worker=f"w{number}", **{**case.options, **place})
    scheduler = ExponentialLR(optimizer, FACTOR)
    told = _Told(optimizer, steps)
    begun.wait(SILENT_S)  # with workers="live", the first step is to wait for all
    for step in range(case.steps):
        for p, gradient in zip(own, drawn(1000 * number + step + 1, case.shapes), strict=True):
            p.grad = gradient
        optimizer.step()
        scheduler.step()
        told.take()
    ended = told.ended(own)
    begun.wait(SILENT_S)
    optimizer.close()
    return ended


def _rounds(case: Case, place: RemoteOptions, number: int, begun: threading.Barrier, steps: Steps) -> Ended:
    worker = rounds.Worker(case.make, place, number)
    with worker.rounds:
        outer = worker.rounds.outer
        scheduler, told = ExponentialLR(outer, FACTOR), _Told(outer, steps)
        begun.wait(SILENT_S)
        for _ in range(case.steps):
            worker.train(rounds.EVERY)
            scheduler.step()
            told.take()
    ended = told.ended(worker.parameters)
    begun.wait(SILENT_S)
    worker.rounds.close()
    return ended


class _Told:
    """What one worker is told of its steps."""

    def __init__(self, optimizer: RemoteOptimizer, steps: Steps) -> None:
        self._optimizer, self._steps = optimizer, steps
        self._versions: list[int] = []
        self._reasons: list[str] = []

    def take(self) -> None:
        report = self._optimizer.last_step
        assert report is not None
        self._versions.append(report.version)
        self._reasons.append(report.reason)
        self._steps.note()

    def ended(self, own: Sequence[Tensor]) -> Ended:
        state = self._optimizer.state_dict()
        averages = self._optimizer.pull_view("ema")
        bits: list[tuple[str, Any]] = [(f"average {index}", each) for index, each in enumerate(averages)]
        bits += [(f"{key} of {index}", value) for index, of in state["state"].items() for key, value in of.items()]
        bits.append(("groups", state["param_groups"]))
        return Ended(self._versions, self._reasons, [p.detach().clone() for p in own], bits)


def disturbed(
    server: RunningServer,
    session: str,
    case: Case,
    remote: RemoteOptions,
    *,
    times: int,
    seed: int,
    end: Callable[[RunningServer], object] = RunningServer.kill,
    url: str = "",
) -> list[Ended]:
    """Train as `train` does, while the server is ended so many times, and started again.

    Args:
        server, session, case, remote: as of `train`.
        times: how often.
        seed: decides when.
        end: ends the server; it returns when there is no such process any more.
        url: where the workers reach it, if not at its TCP port.

    Raises:
        AssertionError: the training was over before the last end, or makes no progress.
    """
    rng, steps, pushes = random.Random(seed), Steps(), case.steps * case.workers
    places = sorted(rng.sample(range(1, pushes * 3 // 4), times))
    with ThreadPoolExecutor(1) as threads:
        training = threads.submit(train, url or server.url, session, case, remote, steps)
        for place in places:
            assert steps.reach(place, SILENT_S), "no step for too long"
            steps.reach(pushes, rng.uniform(0, AFTER_S))
            assert not training.done(), "the training was over before the server was ended"
            end(server)
            server.restart()
        return training.result(SILENT_S)
