"""How an optimizer ends, and what becomes of its session."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from farstep.conversation import Conversation
from farstep.errors import FarstepError, Fenced, UnknownSession
from farstep.optim import SGD, Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.twins import Twins, check_parameters, drawn, parameters
from tests.support.forks import in_a_fork
from tests.support.service.servers import RunningServer, sessions_at


def test_a_closed_optimizer_says_so(place: RemoteOptions) -> None:
    """After close() whatever needs the session is refused in words, and closing again is nothing."""
    twins = Twins("Adagrad", {}, place)
    twins.train(1)
    state = twins.ours.state_dict()
    twins.ours.close()
    twins.ours.close()
    calls: list[Callable[[], object]] = [
        twins.ours.step,
        twins.ours.pull,
        twins.ours.state_dict,
        twins.ours.rejoin,
        lambda: twins.ours.load_state_dict(state),
    ]
    for call in calls:
        with pytest.raises(FarstepError, match="was closed"):
            call()
    check_parameters(twins.here, twins.there)


@pytest.mark.promise(
    "A private session goes with its optimizer; a session with a name stays.",
    area="sessions and files",
)
def test_a_private_session_goes_with_its_optimizer(server: RunningServer, talk: Conversation) -> None:
    """An optimizer that nobody holds any more takes its private session away from the server."""
    optimizer = Adagrad(parameters(drawn(0)), server=server.url)
    path = f"/v1/sessions/{optimizer.session}"
    assert talk.control("GET", path)["initialised"]
    del optimizer
    gc.collect()
    with pytest.raises(UnknownSession):
        talk.control("GET", path)


@pytest.mark.promise(
    "A private session goes with its optimizer; a session with a name stays.",
    area="sessions and files",
)
def test_a_named_session_stays_when_its_workers_leave(server: RunningServer, talk: Conversation) -> None:
    """close() gives the worker's place up; the session and its parameters stay for others."""
    optimizer = Adagrad(parameters(drawn(0)), server=server.url, session="stays", worker="w0")
    optimizer.close()
    document = talk.control("GET", "/v1/sessions/stays")
    assert document["initialised"]
    assert document["workers"] == {}
    talk.control("DELETE", "/v1/sessions/stays")


def test_a_session_that_cannot_be_joined_leaves_nothing_behind(server: RunningServer) -> None:
    """A parameter the server cannot hold is refused, naming the dtype, and no session stays."""
    before = sessions_at(server.url)
    with pytest.raises(FarstepError, match="float8"):
        Adagrad([torch.ones(3).to(torch.float8_e5m2).requires_grad_()], server=server.url)
    assert sessions_at(server.url) == before


@pytest.mark.promise(
    "A forked process neither steps under its parent's name nor ends its parent's session.",
    area="client errors",
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_end_the_session_of_its_parent(server: RunningServer) -> None:
    """A process that was forked off, as by a data loader, may drop its copy of the optimizer; the session stays."""
    twins = Twins("Adagrad", {}, {"server": server.url, "kernel": "reference"})
    twins.train(1)
    assert in_a_fork(twins.ours.close) == 0
    twins.train(1, first=2)
    twins.check()


@pytest.mark.promise(
    "A forked process neither steps under its parent's name nor ends its parent's session.",
    area="client errors",
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_step_under_the_name_of_its_parent(server: RunningServer) -> None:
    """Its step is refused: with the same gradient as its parent's next one, that would have passed for a repetition."""
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = SGD([parameter], lr=1.0, server=server.url)
    parameter.grad = torch.ones(3)

    def step() -> None:
        with pytest.raises(Fenced, match="forked"):
            optimizer.step()

    assert in_a_fork(step) == 0
    optimizer.step()
    assert optimizer.version == 1
    assert parameter.tolist() == [-1.0] * 3
    optimizer.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_that_joins_again_is_the_worker(server: RunningServer) -> None:
    """After `rejoin()` the fork steps, and its parent is the one that is fenced."""
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = SGD([parameter], lr=1.0, server=server.url)
    parameter.grad = torch.ones(3)

    def step() -> None:
        optimizer.rejoin()
        optimizer.step()
        assert optimizer.version == 1

    assert in_a_fork(step) == 0
    with pytest.raises(Fenced):
        optimizer.step()
    optimizer.rejoin()
    assert parameter.tolist() == [-1.0] * 3
    optimizer.close()
