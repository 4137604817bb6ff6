"""Two writers on one memory: optimizers, threads and processes that step on the same parameters, beside torch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from torch import Tensor

import farstep
from farstep.errors import FarstepError
from farstep.optim.writers import Writing
from farstep.settings import RemoteOptions
from tests.support.client import hogwild
from tests.support.client.hogwild import LR, gradient, train
from tests.support.client.twins import check_equal
from tests.support.service.servers import RunningServer


def model() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (5,))]


def shared_model() -> list[Tensor]:
    ps = model()
    for p in ps:
        p.share_memory_()  # type: ignore[no-untyped-call]
    return ps


def values(ps: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in ps]


def step(optimizer: Any, ps: list[Tensor], seed: int) -> None:
    for p in ps:
        p.grad = gradient(seed, p)
    optimizer.step()


def sgd(ps: list[Tensor], place: RemoteOptions, lr: float = LR) -> farstep.optim.SGD:
    return farstep.optim.SGD(ps, lr=lr, momentum=0.9, foreach=False, **place)


def torchs(ps: list[Tensor], lr: float = LR) -> torch.optim.SGD:
    return torch.optim.SGD(ps, lr=lr, momentum=0.9, foreach=False)


# -- in one thread


def test_optimizers_that_take_turns_step_as_torchs_do(place: RemoteOptions) -> None:
    """Two on one model, each with its own momentum: what one brings is the other's edit, bit for bit as with torch."""
    here, there = model(), model()
    mine, theirs = [sgd(here, place, lr) for lr in (0.1, 0.03)], [torchs(there, lr) for lr in (0.1, 0.03)]
    for seed in range(6):
        step(mine[seed % 2], here, seed)
        step(theirs[seed % 2], there, seed)
        check_equal(values(here), values(there))


# -- threads


@pytest.mark.parametrize("same", [True, False], ids=["one optimizer", "one model"])
def test_steps_of_threads_are_all_counted(same: bool, place: RemoteOptions) -> None:
    """Threads that step at once, on one optimizer or two, wait for each other: the sum of what they push is applied."""
    ps = [torch.nn.Parameter(torch.zeros(64))]
    ps[0].grad = torch.ones(64)
    optimizers = [farstep.optim.SGD(ps, lr=1.0, **place) for _ in range(1 if same else 2)]
    begin = threading.Barrier(4)

    def run(index: int) -> None:
        begin.wait()
        for _ in range(10):
            optimizers[index % len(optimizers)].step()

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(run, index) for index in range(4)]:
            future.result()
    assert torch.equal(ps[0].detach(), torch.full((64,), -40.0))


def test_workers_of_a_barrier_that_share_a_model_are_refused(shared: RemoteOptions) -> None:
    """Two threads of one sync session on the same parameters would wait for each other for ever: the second is told."""
    ps = model()
    place: RemoteOptions = {**shared, "consistency": farstep.Sync(workers=2, deadline_s=30.0)}
    first, second = (sgd(ps, {**place, "worker": name}) for name in ("w0", "w1"))
    member = first._membership
    with ThreadPoolExecutor(1) as threads:
        with member.writing():  # as during a step that waits at the barrier
            refused = threads.submit(step, second, ps, 1).exception()
        assert isinstance(refused, FarstepError)
        assert "model of its own" in str(refused)


def test_other_parameters_need_no_turn() -> None:
    """Threads that step on different memory do not wait for each other, whatever else their sessions wait for."""
    inside = threading.Event()

    def other() -> None:
        with Writing(frozenset({2}), waits=True):
            inside.set()

    with Writing(frozenset({1}), waits=True), Writing(frozenset({1}), waits=True), ThreadPoolExecutor(1) as threads:
        threads.submit(other).result()
    assert inside.is_set()


# -- processes


# A process of a fork server shares as little with this one as one that is spawned, and has torch already.
processes.get_context("forkserver").set_forkserver_preload([hogwild.__name__])


class Process:
    """A process that steps when it is told to."""

    def __init__(self, how: str, kind: str, options: dict[str, Any], ps: list[Tensor]) -> None:
        context: Any = processes.get_context(how)
        self._seeds, self._answers = context.Queue(), context.Queue()
        self._process = context.Process(target=train, args=(kind, options, ps, self._seeds, self._answers))
        self._process.start()

    def step(self, seed: int) -> str:
        self._seeds.put(seed)
        return str(self._answers.get(timeout=60))

    def end(self) -> None:
        self._seeds.put(None)
        self._process.join(30)
        assert self._process.exitcode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.join(30)


@contextmanager
def running(how: str, kind: str, ps: list[Tensor], *options: dict[str, Any]) -> Iterator[list[Process]]:
    started = [Process(how, kind, each, ps) for each in options]
    try:
        yield started
    finally:
        for each in started:
            each.kill()


@pytest.mark.parametrize("how", ["forkserver", "fork"])
def test_embedded_processes_on_one_model_are_torchs_hogwild(how: str) -> None:
    """An embedded optimizer steps in the shared memory itself: processes that take turns give torch's bits."""
    here, there = shared_model(), shared_model()
    kernel = {"kernel": "reference"}
    with running(how, "farstep", here, kernel, kernel) as mine, running(how, "torch", there, {}, {}) as theirs:
        for seed in range(4):
            assert mine[seed % 2].step(seed) == ""
            assert theirs[seed % 2].step(seed) == ""
            check_equal(values(here), values(there))


@pytest.mark.promise(
    "Two processes that step on one model in shared memory through a server are told, not mixed.",
    area="client errors",
)
@pytest.mark.parametrize("named", [True, False], ids=["one session", "private sessions"])
@pytest.mark.parametrize("how", ["forkserver", "fork"])
def test_a_second_process_on_one_model_is_refused(how: str, named: bool, server: RunningServer) -> None:
    """The first process to step through a server goes on with torch's bits; the second one is told what to do."""
    here, there = shared_model(), model()
    place: dict[str, Any] = {"server": server.url, "kernel": "reference"}
    options = [{**place, **({"session": f"hogwild-{how}", "worker": f"w{i}"} if named else {})} for i in range(2)]
    theirs = torchs(there)
    with running(how, "farstep", here, *options) as (first, second):
        for seed in range(3):
            assert first.step(seed) == ""
            step(theirs, there, seed)
            refused = second.step(100 + seed)
            assert "another process steps on them" in refused
            assert "farstep.Async()" in refused
            check_equal(values(here), values(there))
        first.end()
        assert second.step(9) == ""  # the memory is free again


def test_a_process_that_died_holds_nothing(server: RunningServer) -> None:
    """A worker that was killed and one that takes its place: the system gives the memory back."""
    here = shared_model()
    place = {"server": server.url, "kernel": "reference"}
    with running("forkserver", "farstep", here, place, place) as (first, second):
        assert first.step(1) == ""
        first.kill()
        assert second.step(2) == ""


def test_one_writer_may_share_its_memory(server: RunningServer) -> None:
    """Sharing a model with processes that read it, before or after the first step, changes no bit."""
    here, there = model(), model()
    place: RemoteOptions = {"server": server.url, "kernel": "reference"}
    mine, theirs = sgd(here, place), torchs(there)
    for seed in range(4):
        if seed == 2:
            for p in here:
                p.share_memory_()  # type: ignore[no-untyped-call]
        step(mine, here, seed)
        step(theirs, there, seed)
    check_equal(values(here), values(there))
    mine.close()
    again = sgd(here, place)  # what was given back can be had again
    step(again, here, 5)
    again.close()
