"""farstep.optim.LBFGS in a session on a server: every evaluation counts once, and several workers step together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.conversation import Conversation
from farstep.errors import SessionLost, StepDiscarded, Unavailable
from farstep.settings import RemoteOptions
from tests.support.client.lbfgs import WOLFE, check, check_state, ours, theirs
from tests.support.client.twins import check_equal
from tests.support.faults import Network, faulty
from tests.support.optimizers.objectives import (
    Objective,
    cliff,
    network,
    rosenbrock,
)
from tests.support.service.servers import RunningServer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network_to(server: RunningServer) -> Iterator[Network]:
    """Put a network that fails between the client and the server."""
    with faulty(server.port) as between:
        yield between


@pytest.mark.parametrize("options", [{"lr": 0.3}, WOLFE], ids=["fixed", "wolfe"])
@pytest.mark.parametrize("fault", ["request", "response"])
def test_every_evaluation_counts_once_however_often_it_is_sent(
    fault: str, options: dict[str, Any], network_to: Network
) -> None:
    """Requests and answers that are cut in the middle of steps are repeated, and the bits are torch's."""
    here, there = cliff(torch.float64), cliff(torch.float64)
    mine, other = ours(here, **options, max_iter=6, server=network_to.url), theirs(there, **options, max_iter=6)

    def closure() -> Tensor:
        if here.evaluations % 3 == 1:
            if fault == "request":
                network_to.cut_request(after=200)
            else:
                network_to.cut_response(after=60)
        return here.closure()

    for _ in range(4):
        mine.step(closure)
        other.step(there.closure)
    assert network_to.faults_left == 0
    assert mine.version == here.evaluations
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_step_that_was_given_up_for_want_of_an_answer_can_be_followed_by_another(network_to: Network) -> None:
    """When the server is away in the middle of a step, the step fails; the next one begins anew and works."""
    objective = rosenbrock(torch.float64)
    optimizer = ours(objective, **WOLFE, server=network_to.url, timeout_s=0.3)
    optimizer.step(objective.closure)
    counted = objective.evaluations

    def closure() -> Tensor:
        if objective.evaluations == counted + 2:
            network_to.cut_response(after=10, then_down=True)
        return objective.closure()

    with pytest.raises(Unavailable):
        optimizer.step(closure)
    network_to.down = False
    before = float(objective.loss().detach())
    optimizer.step(objective.closure)
    assert optimizer.last_step is not None
    assert not optimizer.last_step.again
    assert float(objective.loss().detach()) <= before


def test_a_session_that_was_removed_is_created_anew_from_a_state_dict(
    server: RunningServer, talk: Conversation
) -> None:
    """`rejoin` continues bit for bit from what was saved, at the version that was held."""
    here, there = network(torch.float64), network(torch.float64)
    mine, other = ours(here, **WOLFE, server=server.url), theirs(there, **WOLFE)
    for _ in range(3):
        mine.step(here.closure)
        other.step(there.closure)
    saved, version = copy.deepcopy(mine.state_dict()), mine.version
    talk.control("DELETE", f"/v1/sessions/{mine.session}")
    with pytest.raises(SessionLost):
        mine.step(here.closure)
    assert mine.rejoin(saved)
    assert mine.version == version
    for _ in range(2):
        mine.step(here.closure)
        other.step(there.closure)
    check_equal([p.detach() for p in here.parameters], [p.detach() for p in there.parameters])
    check_state(mine.state_dict(), other.state_dict())


def halves(dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    """Return two objectives of one parameter; their mean is the whole."""
    first, second = torch.tensor([1.0, -2.0, 0.5], dtype=dtype), torch.tensor([0.3, 4.0, -1.0], dtype=dtype)
    return [lambda p: ((p - first) ** 4).sum() + (p * second).sum(), lambda p: (torch.exp(p) * second**2).sum()]


def test_two_workers_step_along_the_mean_of_their_objectives(server: RunningServer) -> None:
    """Sync: gradients and losses are averaged at each evaluation; both workers have what torch has for the mean."""
    name = "lbfgs-two-workers"
    objectives = halves(torch.float64)

    def train(worker: int) -> tuple[Tensor, int]:
        p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        one = Objective([p], lambda: objectives[worker](p))
        options: RemoteOptions = {
            "server": server.url,
            "session": name,
            "worker": f"w{worker}",
            "consistency": farstep.Sync(workers=2, deadline_s=60.0),
        }
        optimizer = farstep.optim.LBFGS([p], **WOLFE, max_iter=5, **options)
        for _ in range(3):
            optimizer.step(one.closure)
        return p.detach(), one.evaluations

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(train, (0, 1)))

    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    calls = 0

    def mean() -> float:
        nonlocal calls
        calls += 1
        losses: list[float] = []
        gradients: list[Any] = []
        for each in objectives:
            p.grad = None
            loss = each(p)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
            gradients.append(p.grad)
        p.grad = (gradients[0] + gradients[1]) / 2
        return (losses[0] + losses[1]) / 2

    alone: Any = torch.optim.LBFGS([p], **WOLFE, max_iter=5)
    for _ in range(3):
        with torch.enable_grad():
            alone.step(mean)
    for parameter, evaluations in results:
        assert torch.equal(parameter, p.detach())
        assert evaluations == calls


def test_another_worker_who_begins_a_step_ends_the_unfinished_one(server: RunningServer) -> None:
    """In an async session a step belongs to whoever began last; the other one is told, and may begin again."""
    first, second = rosenbrock(torch.float64), rosenbrock(torch.float64)
    place: RemoteOptions = {"server": server.url, "session": "lbfgs-async"}
    one = ours(first, **WOLFE, worker="one", **place)
    two = ours(second, **WOLFE, worker="two", **place)
    calls = 0

    def interrupted() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            two.step(second.closure)
        return first.closure()

    with pytest.raises(StepDiscarded, match="given up"):
        one.step(interrupted)
    one.pull()
    assert torch.equal(first.parameters[0], second.parameters[0])
    before = float(first.loss().detach())
    one.step(first.closure)
    assert float(first.loss().detach()) < before
