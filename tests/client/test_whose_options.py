"""Whose learning rate counts where several workers share a session, compared with torch's steps at that rate."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption, OptionsDiffer, Unavailable
from farstep.settings import RemoteOptions, resolve
from tests.support.client.twins import check_equal, drawn, parameters
from tests.support.faults import Network
from tests.support.service.servers import RunningServer

LR = 0.1


class Worker:
    """A worker of an SGD session, and how it steps."""

    def __init__(self, place: RemoteOptions, name: str, *, lr: Any = LR, **options: Any) -> None:
        self.parameters = parameters(drawn(0))
        self.optimizer = farstep.optim.SGD(
            self.parameters, lr=lr, momentum=0.9, foreach=False, worker=name, **{**place, **options}
        )

    @property
    def lr(self) -> Any:
        return self.optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: Any) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    @property
    def in_force(self) -> float:
        return float(self.optimizer.options_in_force()[0]["lr"])

    def step(self, seed: int) -> farstep.StepReport:
        for p, gradient in zip(self.parameters, drawn(seed), strict=True):
            p.grad = gradient
        self.optimizer.step()
        assert self.optimizer.last_step is not None
        return self.optimizer.last_step


def torchs(*steps: tuple[float, list[int]]) -> list[Tensor]:
    """Return where torch's SGD is after steps at some rates, each along the mean of some gradients."""
    ps = parameters(drawn(0))
    optimizer = torch.optim.SGD(ps, lr=LR, momentum=0.9, foreach=False)
    for lr, seeds in steps:
        optimizer.param_groups[0]["lr"] = lr
        for p, *gradients in zip(ps, *map(drawn, seeds), strict=True):
            p.grad = sum(gradients[1:], start=gradients[0]) / len(gradients)
        optimizer.step()
    return [p.detach() for p in ps]


def check(worker: Worker, *steps: tuple[float, list[int]]) -> None:
    worker.optimizer.pull()
    check_equal([p.detach() for p in worker.parameters], torchs(*steps))


# -- a set of options for the session


def test_joining_takes_the_options_in_force(shared: RemoteOptions) -> None:
    """A late worker's fresh rate does not overwrite the schedule: its groups show what is in force, and it steps so."""
    first = Worker(shared, "w0")
    first.lr = 0.025
    first.step(1)
    late = Worker(shared, "w1")
    assert late.lr == 0.025
    late.step(2)
    assert first.in_force == late.in_force == 0.025
    check(first, (0.025, [1]), (0.025, [2]))
    late.lr = LR  # a change of its own, as explicit as any
    late.step(3)
    check(first, (0.025, [1]), (0.025, [2]), (LR, [3]))


def test_the_options_in_force_are_a_way_to_join(shared: RemoteOptions) -> None:
    """Who names the rate of the creation or that in force joins; another one is taken for a mistake and named."""
    first = Worker(shared, "w0")
    first.lr = 0.025
    first.step(1)
    assert Worker(shared, "w1", lr=0.025).lr == 0.025
    with pytest.raises(OptionsDiffer, match=r"lr of its group 0 was created as 0\.1 and is 0\.025, not 0\.5"):
        Worker(shared, "w2", lr=0.5)


def test_a_worker_that_asks_for_the_sessions_options_has_them(shared: RemoteOptions) -> None:
    """With options="session" whatever it names is replaced, in the form that its groups have: a float or a tensor."""
    first = Worker(shared, "w0")
    first.lr = 0.025
    first.step(1)
    second = Worker(shared, "w1", lr=0.5, options="session")
    third = Worker(shared, "w2", lr=torch.tensor(0.5, dtype=torch.float64), options="session")
    assert second.lr == 0.025
    assert torch.equal(third.lr, torch.tensor(0.025, dtype=torch.float64))
    third.step(2)
    check(second, (0.025, [1]), (0.025, [2]))


def test_coming_back_takes_the_options_in_force_where_they_are_the_sessions(shared: RemoteOptions) -> None:
    """After rejoin() one with options="session" has what others set meanwhile; without the word it sends its own."""
    told, own, other = (Worker(shared, "w0", options="session"), Worker(shared, "w1"), Worker(shared, "w2"))
    other.lr = 0.025
    other.step(1)
    assert not told.optimizer.rejoin()
    assert told.lr == 0.025
    told.step(2)
    assert not own.optimizer.rejoin()
    own.step(3)
    assert own.in_force == LR
    check(other, (0.025, [1]), (0.025, [2]), (LR, [3]))


def test_a_group_that_is_there_is_added_with_the_options_in_force(shared: RemoteOptions) -> None:
    """The second worker to add a group finds it with the rate that the first one set meanwhile, and shows it."""
    first, second = Worker(shared, "w0"), Worker(shared, "w1")
    for worker in (first, second):
        late = torch.nn.Parameter(torch.ones(3))
        worker.optimizer.add_param_group({"params": [late], "lr": 0.5})
        if worker is first:
            first.optimizer.param_groups[1]["lr"] = 0.125
            late.grad = torch.ones(3)
            first.optimizer.step()
    assert second.optimizer.param_groups[1]["lr"] == 0.125
    assert second.optimizer.options_in_force()[1]["lr"] == 0.125


# -- options of each push


def test_each_push_has_its_own_options(shared: RemoteOptions) -> None:
    """Two schedules in one session: each step has the rate of the worker that made it, and nothing stays in force."""
    fast, slow = (Worker(shared, name, lr=lr, options="push") for name, lr in (("w0", 0.2), ("w1", 0.02)))
    fast.step(1)
    slow.optimizer.pull()
    slow.step(2)
    fast.lr = 0.15
    fast.step(3)
    slow.step(4)
    assert (fast.lr, slow.lr) == (0.15, 0.02)
    assert fast.in_force == slow.in_force == 0.2  # as it was created
    check(fast, (0.2, [1]), (0.02, [2]), (0.15, [3]), (0.02, [4]))


def test_both_kinds_may_share_a_session(shared: RemoteOptions) -> None:
    """What one worker changes in the session does not reach the steps of one that brings its own, nor back."""
    session, own = Worker(shared, "w0"), Worker(shared, "w1", lr=0.01, options="push")
    session.lr = 0.05
    session.step(1)
    own.step(2)
    session.step(3)
    assert session.in_force == 0.05
    check(session, (0.05, [1]), (0.01, [2]), (0.05, [3]))


def test_a_push_that_is_repeated_has_the_same_options(network: Network, shared: RemoteOptions) -> None:
    """An answer that is lost, and the step tried again: it is applied once, at the rate of its first time."""
    place: RemoteOptions = {**shared, "server": network.url, "timeout_s": 1.0}
    worker = Worker(place, "w0", options="push")
    other = Worker(shared, "w1")
    worker.lr = 0.2
    worker.step(1)
    network.cut_response(after=0, then_down=True)
    with pytest.raises(Unavailable):
        worker.step(2)
    network.down = False
    other.optimizer.pull()
    other.lr = 0.05
    other.step(3)
    assert worker.step(2).duplicate
    check(worker, (0.2, [1]), (0.2, [2]), (0.05, [3]))


def test_alone_both_are_torchs_bits(server: RunningServer) -> None:
    """One worker with a scheduler steps as torch does, whichever it asks for, embedded and on a server."""
    for place in ({}, {"server": server.url}):
        for options in (None, "session", "push"):
            worker = Worker({"kernel": "reference", **place}, "w0", options=options)  # type: ignore[typeddict-item]
            schedule = torch.optim.lr_scheduler.ExponentialLR(worker.optimizer, 0.5)
            for seed in (1, 2, 3):
                worker.step(seed)
                schedule.step()
            check(worker, (LR, [1]), (LR / 2, [2]), (LR / 4, [3]))


# -- workers of a step that disagree


def stepped(workers: list[Worker], seed: int, threads: ThreadPoolExecutor) -> list[farstep.StepReport]:
    futures = [threads.submit(worker.step, seed + index) for index, worker in enumerate(workers)]
    return [future.result() for future in futures]


@pytest.mark.parametrize("options", ["session", "push"])
def test_workers_of_a_step_that_disagree_are_warned(
    shared: RemoteOptions, threads: ThreadPoolExecutor, options: str
) -> None:
    """Each is told by name who said what, and which was used: the last in the order of the sum, whoever came last."""
    place: Any = {**shared, "consistency": farstep.Sync(workers=2), "options": options}
    workers = [Worker(place, "w0"), Worker(place, "w1")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for worker in workers:
            worker.lr = 0.05
        assert [report.disagreement for report in stepped(workers, 1, threads)] == ["", ""]
    workers[0].lr, workers[1].lr = 0.2, 0.02
    with pytest.warns(UserWarning, match=r"lr of group 0 is 0\.2 from w0, 0\.02 from w1; 0\.02 was used\."):
        reports = stepped(workers, 3, threads)
    assert len({report.disagreement for report in reports}) == 1
    check(workers[0], (0.05, [1, 2]), (0.02, [3, 4]))


# -- how it is asked for


def test_the_environment_may_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """FARSTEP_OPTIONS is the default of the argument; what is neither is refused by name."""
    assert resolve({}, {"FARSTEP_OPTIONS": "push"}).options == "push"
    assert resolve({"options": "session"}, {"FARSTEP_OPTIONS": "push"}).options == "session"
    assert resolve({}, {}).options is None
    for said in ("worker", 3):
        with pytest.raises(InvalidOption, match=f"options: {said!r}"):
            resolve({"options": said}, {})  # type: ignore[typeddict-item]


def test_a_server_shows_what_is_in_force(shared: RemoteOptions, talk: Conversation) -> None:
    """The page of a session and its own route say the same, which PATCH changes."""
    worker = Worker(shared, "w0")
    path = f"/v1/sessions/{worker.optimizer.session}"
    talk.control("PATCH", f"{path}/groups", {"groups": {"0": {"lr": 0.5}}})
    assert talk.control("GET", path)["groups"] == talk.control("GET", f"{path}/groups")["groups"]
    assert worker.in_force == 0.5
