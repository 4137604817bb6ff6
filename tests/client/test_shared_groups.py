"""`add_param_group` where several workers share a session: each adds the group, and none is passed over."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from farstep import Sync
from farstep.conversation import Conversation
from farstep.errors import Fenced, OptionsDiffer
from farstep.optim import Adagrad, RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.growing import LATE, named
from tests.support.client.twins import check_equal, check_parameters, drawn, parameters
from tests.support.service.servers import RunningServer


class Member:
    """A worker of a shared session, with a model of its own."""

    def __init__(self, place: RemoteOptions, name: str) -> None:
        self.parameters = parameters(drawn(0))
        self.late = parameters(drawn(7 if name == "w0" else 8))
        own: RemoteOptions = {**place, "worker": name}
        self.optimizer: RemoteOptimizer = Adagrad(self.parameters, lr=0.1, foreach=False, **own)

    def add(self, **options: Any) -> None:
        self.optimizer.add_param_group({"params": self.late, **(options or LATE)})
        self.parameters = [*self.parameters, *self.late]

    def step(self, seed: int) -> None:
        for p, gradient in zip(self.parameters, drawn(seed, [p.shape for p in self.parameters]), strict=True):
            p.grad = gradient
        self.optimizer.step()


def members(place: RemoteOptions, *names: str) -> list[Member]:
    return [Member(place, name) for name in names]


class Oracle:
    """torch's Adagrad, which takes the steps that all workers take together."""

    def __init__(self) -> None:
        self.parameters = parameters(drawn(0))
        self.optimizer = torch.optim.Adagrad(self.parameters, lr=0.1, foreach=False)

    def add(self) -> None:
        late = parameters(drawn(7))
        self.optimizer.add_param_group({"params": late, **LATE})
        self.parameters += late

    def step(self, seed: int) -> None:
        for p, gradient in zip(self.parameters, drawn(seed, [p.shape for p in self.parameters]), strict=True):
            p.grad = gradient
        self.optimizer.step()


def test_two_workers_add_the_same_group(server: RunningServer) -> None:
    """The second one is told to, takes the session's parameters, and both go on as one torch optimizer would."""
    w0, w1 = members(named(server), "w0", "w1")
    oracle = Oracle()
    w0.step(1)
    w1.step(2)
    w0.add()
    w0.step(3)
    with torch.no_grad():
        w1.parameters[0].add_(1)
    with pytest.raises(Fenced, match=r"Worker 'w0' added param group 1.*Add the same group with add_param_group"):
        w1.step(4)
    w1.add()
    oracle.step(1)
    oracle.step(2)
    oracle.add()
    oracle.step(3)
    check_parameters(w1.parameters, oracle.parameters)
    assert w1.optimizer.version == 4
    w1.step(4)
    oracle.step(4)
    check_parameters(w1.parameters, oracle.parameters)
    for p, q in zip(w1.parameters, oracle.parameters, strict=True):
        check_equal([w1.optimizer.state[p]["sum"]], [oracle.optimizer.state[q]["sum"]])
    w0.optimizer.pull()
    check_parameters(w0.parameters, oracle.parameters)


def test_a_worker_that_adds_a_group_keeps_its_version(server: RunningServer) -> None:
    """Where others have stepped since, adding a group does not claim that their steps are here."""
    w0, w1 = members(named(server), "w0", "w1")
    w1.step(1)
    w0.add()
    assert w0.optimizer.version == 0
    w0.step(2)
    report = w0.optimizer.last_step
    assert report is not None
    assert (report.version, report.staleness) == (3, 2)


def test_workers_learn_groups_in_turn(server: RunningServer) -> None:
    """Groups that two workers added are learned by a third one after the other."""
    w0, w1, w2 = members(named(server), "w0", "w1", "w2")
    more = [parameters(drawn(9, [(4,)])) for _ in range(3)]
    w0.add()
    w1.add()
    w1.optimizer.add_param_group({"params": more[1], "lr": 0.7})
    w2.add()
    with pytest.raises(Fenced, match="Worker 'w1' added param group 2"):
        w2.step(1)
    with pytest.raises(Fenced, match="param group 2"):
        w2.optimizer.pull()
    for member, late in ((w2, more[2]), (w0, more[0])):
        member.optimizer.add_param_group({"params": late, "lr": 0.7})
        member.parameters = [*member.parameters, *late]
    for seed, member in enumerate((w2, w0)):
        member.step(seed)
    w2.optimizer.pull()
    check_parameters(w0.parameters, w2.parameters)


@pytest.mark.parametrize("different", ["options", "shapes", "count"])
def test_another_group_is_refused(server: RunningServer, different: str) -> None:
    """A group that differs from the session's: what differs in words, nothing changed, and a second try works."""
    w0, w1 = members(named(server), "w0", "w1")
    w0.add()
    late = {"options": w1.late, "shapes": parameters(drawn(1, [(9,)] * 6)), "count": w1.late[:-1]}[different]
    options = {"lr": 0.5} if different == "options" else LATE
    with pytest.raises(OptionsDiffer, match="has a param group 1, but"):
        w1.optimizer.add_param_group({"params": late, **options})
    assert len(w1.optimizer.param_groups) == 1
    w1.add()
    w1.step(1)
    w0.optimizer.pull()
    check_parameters(w0.parameters, w1.parameters)


def test_nothing_of_a_worker_that_lags_is_silent(server: RunningServer) -> None:
    """Pulling, saving and reading state, editing and joining again all say that the session has grown."""
    w0, w1 = members(named(server), "w0", "w1")
    w1.step(1)
    w0.add()
    for look in (w1.optimizer.pull, w1.optimizer.state_dict, lambda: len(w1.optimizer.state)):
        with pytest.raises(Fenced, match="added param group 1"):
            look()
    with pytest.raises(OptionsDiffer, match="it has 12 parameters, not 6"):
        w1.optimizer.rejoin()
    w1.add()
    assert len(w1.optimizer.state_dict()["state"]) == 12


def test_joining_later_with_all_groups(server: RunningServer) -> None:
    """A worker that gives all groups to the constructor joins a session that grew."""
    place = named(server)
    (w0,) = members(place, "w0")
    w0.add()
    w0.step(1)
    here = parameters(drawn(3, [p.shape for p in w0.parameters]))
    Adagrad([{"params": here[:6]}, {"params": here[6:], **LATE}], lr=0.1, foreach=False, **place)
    check_parameters(here, w0.parameters)


def test_a_worker_at_the_barrier_is_told(server: RunningServer, talk: Conversation) -> None:
    """In a sync session the one who waits learns that the session grew, adds the group, and both step together."""
    place: RemoteOptions = {**named(server), "consistency": Sync(workers=2)}
    w0, w1 = members(place, "w0", "w1")
    before = [p.detach().clone() for p in w1.parameters]
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(w1.step, 1)
        while not talk.control("GET", f"/v1/sessions/{w1.optimizer.session}/workers/w1")["waiting"]:
            pass
        w0.add()
        with pytest.raises(Fenced, match="Worker 'w0' added param group 1"):
            waiting.result()
        check_parameters(w1.parameters, before)
        w1.add()
        for step in (threads.submit(w0.step, 1), threads.submit(w1.step, 1)):
            step.result()
    oracle = Oracle()
    oracle.add()
    oracle.step(1)
    for member in (w0, w1):
        check_parameters(member.parameters, oracle.parameters)
        assert member.optimizer.version == 2
