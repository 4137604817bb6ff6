"""`add_param_group` over networks that lose answers, and to servers that die: a group is added once."""

from __future__ import annotations

import pytest
import torch

import farstep
from farstep.errors import Fenced, OptionsDiffer, SessionLost, Unavailable
from farstep.settings import RemoteOptions
from tests.support.client.growing import LATE, add, named
from tests.support.client.twins import Twins, check_parameters, drawn, parameters
from tests.support.faults import Network
from tests.support.service.servers import RunningServer, running_server

SHORT_S = 1.0
"""Long enough for a busy machine to answer, short enough to wait for."""


@pytest.mark.promise("A param group is added once, whatever the network does.", area="exactly once")
@pytest.mark.parametrize("way", ["request", "response"])
def test_a_group_is_added_once_wherever_it_is_cut(network: Network, way: str) -> None:
    """A request or an answer that is cut after any number of bytes is tried again; the group is there once."""
    cut = network.cut_request if way == "request" else network.cut_response
    for after in range(0, 700, 100):
        twins = Twins("Adagrad", {"lr": 0.1}, {"kernel": "reference", "server": network.url}, start=drawn(0, [(3,)]))
        twins.train(1)
        cut(after=after)
        add(twins, drawn(1, [(40,)]), **LATE)
        twins.train(1, first=2)
        assert twins.ours.version == 3
        twins.check()


@pytest.mark.parametrize("applied", [True, False])
def test_adding_again_after_it_was_given_up(network: Network, applied: bool) -> None:
    """The same call repeats the write under its name, whether the server had applied it or not."""
    twins = given_up(network, applied=applied)
    add(twins, drawn(1, [(40,)]), **LATE)
    twins.train(2, first=2)
    assert twins.ours.version == 4
    twins.check()


def given_up(network: Network, *, applied: bool) -> Twins:
    """Return twins of which ours has tried to add a group without an answer."""
    place: RemoteOptions = {"kernel": "reference", "server": network.url, "timeout_s": SHORT_S}
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, [(3,)]))
    twins.train(1)
    if applied:
        network.cut_response(after=0, then_down=True)
    else:
        network.down = True
    with pytest.raises(Unavailable):
        twins.ours.add_param_group({"params": parameters(drawn(1, [(40,)])), **LATE})
    network.down = False
    assert (len(twins.ours.param_groups), twins.ours.version) == (1, 1)
    return twins


def test_going_on_without_a_group_that_never_arrived(network: Network) -> None:
    """If the group was not added, the next step is taken without it."""
    twins = given_up(network, applied=False)
    twins.train(2, first=2)
    twins.check()


def test_going_on_without_a_group_that_did_arrive(network: Network) -> None:
    """If it was added, steps and reads say so, until it is added again; then it is the session's."""
    twins = given_up(network, applied=True)
    for _ in range(2):
        with pytest.raises(Fenced, match="A call that got no answer added param group 1"):
            twins.ours.step()
        with pytest.raises(Fenced, match="param group 1"):
            twins.ours.pull()
    with pytest.raises(OptionsDiffer):
        twins.ours.add_param_group({"params": parameters(drawn(1, [(41,)])), **LATE})
    add(twins, drawn(1, [(40,)]), **LATE)
    twins.train(2, first=2)
    twins.check()


def test_a_session_that_grew_is_created_anew_whole() -> None:
    """After a server was killed, rejoin() brings all groups, the late one included, to the new session."""
    with running_server(loaded=True) as server:
        twins = Twins("Adam", {"lr": 0.1}, {**named(server), "worker": "w0"})
        twins.train(1)
        add(twins, drawn(5), **LATE)
        twins.train(1, first=2)
        state = twins.ours.state_dict()
        server.kill()
        server.restart()
        with pytest.raises(SessionLost):
            twins.ours.step()
        assert twins.ours.rejoin(state)
        twins.train(2, first=3)
        twins.check()


def test_a_late_group_may_go_remote_and_come_home(server: RunningServer) -> None:
    """A torch optimizer moved to a server grows there, and what comes back goes on bit for bit."""
    here, there = parameters(drawn(0)), parameters(drawn(0))
    local, theirs = (torch.optim.Adam(ps, lr=0.1, foreach=False) for ps in (here, there))
    remote = farstep.remote(local, server=server.url, kernel="reference")
    late, other = parameters(drawn(5)), parameters(drawn(5))
    remote.add_param_group({"params": late, **LATE})
    theirs.add_param_group({"params": other, **LATE})
    home: torch.optim.Optimizer | None = None
    for seed in range(3):
        for p, q, gradient in zip(here + late, there + other, drawn(seed, [p.shape for p in here + late]), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        (home or remote).step()
        theirs.step()
        home = home or remote.to_local()
    check_parameters(here + late, there + other)
