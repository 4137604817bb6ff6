"""Workers that train a task in one session, some of them slow or killed, until one of them reaches the mark.

A worker is a fork of the benchmark, which has torch and the data already, so that starting one takes no time; how long
a restart takes is a number of the benchmark's instead. What a backward pass takes is simulated as well: each worker
sleeps until its step has taken `compute_s`, so that cores are not what is measured, and `Outcome.cores` says whether
that was so. BackgroundCompare at how good the model is happens within that time, too.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import httpx
import torch
from torch import nn

import farstep
from farstep.errors import BarrierTimeout, FarstepError, SessionLost
from farstep.protocol.consistency import Consistency
from farstep.settings import RemoteOptions
from tests.benchmarks.crowd import cpu_s
from tests.benchmarks.tasks import Task
from tests.support.service.servers import RunningServer

FORK = multiprocessing.get_context("fork")
LOOK_EVERY_S = 0.05
"""How often the first worker says how good the model is."""
READY_S = 60.0

Step = Callable[[], None]
"""Take a step along the gradients that are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """State who trains and what happens to them.

    Attributes:
        workers: how many there are.
        compute_s: how long a backward pass takes.
        slow: how many times as long it takes on the slow worker.
        turn_s: for how long that is the same one, before it is the next one's turn; the last one, for ever, if 0.
        killed_every_s: how often a worker is killed with SIGKILL, in turn all but the first; 0 for never.
        first_kill_s: when that begins.
        restart_s: how long it is away then.
    """

    workers: int
    compute_s: float
    slow: float = 1.0
    turn_s: float = 0.0
    killed_every_s: float = 0.0
    first_kill_s: float = 2.0
    restart_s: float = 3.0

    def takes_s(self, worker: int, now_s: float) -> float:
        """Return how long a backward pass takes that a worker begins now, on a clock that all have in common."""
        slow_one = int(now_s / self.turn_s) % self.workers if self.turn_s else self.workers - 1
        return self.compute_s * (self.slow if self.workers > 1 and worker == slow_one else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """State how workers train together.

    Attributes:
        name: what it is called.
        consistency: the mode's document, with `workers` given the number of workers.
        rates_of: the way whose learning rate it has, because a step of it is made of as many gradients; "" for its own.
        rounds: local steps in a round; 0 for a step of the session's optimizer each time.
        outer: `LocalSGD` or `DiLoCo`, with rounds.
    """

    name: str
    consistency: Callable[[int], Mapping[str, object]]
    rates_of: str = ""
    rounds: int = 0
    outer: str = ""

    def mode(self, workers: int) -> Consistency:
        """Return the mode.

        Raises:
            InvalidOption: this release does not have it.
        """
        return farstep.protocol.consistency.from_options(self.consistency(workers))


@dataclass(slots=True)
class Outcome:
    """State what a training came to.

    Attributes:
        seconds: until the mark was reached, None if it was not within the time.
        version: the session's version then.
        best: what was reached.
        steps: of all workers together.
        kills: how many workers were killed.
        cores: share of the machine's processor time that workers, server and benchmark used.
    """

    seconds: float | None = None
    version: int = 0
    best: float = 0.0
    steps: int = 0
    kills: int = 0
    cores: float = 0.0
    failures: list[str] = field(default_factory=list)


def warm_up() -> None:
    """Do once what each worker would do first: torch loads its compiler with the first optimizer.

    One thread from here on: those of a process that has several are lost in a fork.
    """
    torch.set_num_threads(1)
    importlib.import_module("farstep.http_link")
    torch.optim.SGD([torch.zeros(1)])


def train(
    task: Task, way: Way, rate: float, around: Surroundings, server: RunningServer, session: str, *, within_s: float
) -> Outcome:
    """Train at a learning rate until the mark is reached or the time is up, and remove the session."""
    place: RemoteOptions = {
        "server": server.url,
        "session": session,
        "consistency": way.mode(around.workers),
        "kernel": "reference",  # a fused one would be built meanwhile, with the cores of the workers
    }
    used_s, began = _used_s(server), time.perf_counter()
    try:
        with _crew(task, way, rate, around, place) as crew:
            outcome = crew.run(within_s)
        took_s = time.perf_counter() - began
        outcome.cores = (_used_s(server) - used_s) / took_s / len(os.sched_getaffinity(0))
    finally:
        httpx.delete(f"{server.url}/v1/sessions/{session}", trust_env=False)
    return outcome


def _used_s(server: RunningServer) -> float:
    """Return the processor seconds of the server, of this process, and of the workers that have ended."""
    ours = [resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return cpu_s(server.pid) + sum(each.ru_utime + each.ru_stime for each in ours)


@dataclass(slots=True)
class _Member:
    process: BaseProcess
    said: Connection


class _Crew:
    def __init__(self, start: Callable[[int, bool], _Member], around: Surroundings) -> None:
        self._start = start
        self._around = around
        self.members = {number: start(number, True) for number in range(around.workers)}
        for each in self.members.values():
            if not each.said.poll(READY_S):
                raise RuntimeError("a worker did not get ready")
            each.said.recv()

    def run(self, within_s: float) -> Outcome:
        """Let all go, kill whom there is to kill, and watch the first one."""
        around, outcome = self._around, Outcome()
        for each in self.members.values():
            each.said.send("go")
        began = time.perf_counter()
        kill_at = around.first_kill_s if around.killed_every_s and around.workers > 1 else float("inf")
        back: dict[int, float] = {}
        while (now := time.perf_counter() - began) < within_s:
            wake = min([kill_at, within_s, *back.values()])
            if self.members[0].said.poll(max(0.0, wake - now)):
                said = self.members[0].said.recv()
                if isinstance(said, str):
                    outcome.failures.append(said)
                    break
                done, measured, outcome.version, outcome.steps = said
                outcome.best = measured
                if done:
                    outcome.seconds = time.perf_counter() - began
                    break
            now = time.perf_counter() - began
            if now >= kill_at:
                victim = 1 + outcome.kills % (around.workers - 1)
                self._kill(victim)
                outcome.kills += 1
                back[victim] = now + around.restart_s
                kill_at += around.killed_every_s
            for number in [number for number, when_s in back.items() if when_s <= now]:
                self.members[number] = self._start(number, False)
                del back[number]
        return outcome

    def _kill(self, number: int) -> None:
        process = self.members[number].process
        process.kill()
        process.join()

    def end(self) -> None:
        """Kill all."""
        for number, each in self.members.items():
            self._kill(number)
            each.said.close()


@contextmanager
def _crew(task: Task, way: Way, rate: float, around: Surroundings, place: RemoteOptions) -> Iterator[_Crew]:
    def start(number: int, together: bool) -> _Member:
        here, there = FORK.Pipe()
        named: RemoteOptions = {**place, "worker": f"w{number}"}
        process = FORK.Process(
            target=_work, args=(task, way, rate, around, named, number, there, together), daemon=True
        )
        process.start()
        there.close()
        return _Member(process, here)

    crew = _Crew(start, around)
    try:
        yield crew
    finally:
        crew.end()


def _work(
    task: Task,
    way: Way,
    rate: float,
    around: Surroundings,
    place: RemoteOptions,
    number: int,
    said: Connection,
    together: bool,
) -> None:
    """Train, as one worker; the first one says how good the model is."""
    torch.set_num_threads(1)
    model = task.build()
    try:
        with ExitStack() as stack:
            optimizer, version = _optimizer(way, rate, model, place, stack)
            if together:
                said.send("ready")
                said.recv()
            step, look_at, new = version() * max(1, around.workers), 0.0, False
            while True:
                began = time.perf_counter()
                if number == 0 and new and began >= look_at:
                    measured = task.measure(model)
                    said.send((task.reached(measured), measured, version(), step))
                    look_at = began + LOOK_EVERY_S
                inputs, answers = task.batch(number, step)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), answers).backward()  # type: ignore[no-untyped-call]
                time.sleep(max(0.0, began + around.takes_s(number, began) - time.perf_counter()))
                before = version()
                _step(optimizer)
                step, new = step + 1, version() != before
    except (FarstepError, OSError) as error:
        if not isinstance(error, (BrokenPipeError, SessionLost)):
            said.send(str(error))


def _step(optimizer: torch.optim.Optimizer) -> None:
    """Take a step; one whose barrier was given up was not applied, and the next one goes on."""
    with suppress(BarrierTimeout):
        optimizer.step()


def _optimizer(
    way: Way, lr: float, model: nn.Module, place: RemoteOptions, stack: ExitStack
) -> tuple[torch.optim.Optimizer, Callable[[], int]]:
    """Return what steps, and what says which version of the session is here."""
    if not way.rounds:
        remote = farstep.optim.Adagrad(model.parameters(), lr=lr, **place)
        return remote, lambda: remote.version
    local = torch.optim.Adagrad(model.parameters(), lr=lr)
    kinds = {"LocalSGD": farstep.LocalSGD, "DiLoCo": farstep.DiLoCo}
    rounds = stack.enter_context(kinds[way.outer](model, local, every=way.rounds, **place))
    return local, lambda: rounds.version
