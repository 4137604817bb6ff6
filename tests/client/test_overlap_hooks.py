"""Where `overlap` has nothing to stream, the hooks with which it watches gradients, and the option itself."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import farstep
from farstep.errors import InvalidOption
from farstep.optim import LBFGS, SGD, Adagrad, RemoteOptimizer
from farstep.overlap import OTHERS, STREAMED
from farstep.settings import resolve
from tests.support.client.overlapping import WIDTH, Both, Net, backward, hooks_of, loss_of, plain, senders
from tests.support.client.twins import check_parameters
from tests.support.service.servers import RunningServer, running_server

# -- where there is nothing to stream --------------------------------------------------------------------------------


def test_gradients_that_are_set_by_hand(both: Both) -> None:
    """No backward pass, no stream."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        for p in network.parameters():
            p.grad = torch.full_like(p, 0.1 * seed)
        optimizer.step()

    both.train(2)
    assert both.train(3, step) == ["", "", ""]
    both.check()


def test_sparse_gradients(server: RunningServer) -> None:
    """Among them there is no stream."""
    nets = [nn.Sequential(nn.Embedding(500, 100, sparse=True), nn.Linear(100, 100)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = Adagrad(nets[0].parameters(), server=server.url, kernel="reference", overlap=True)
    theirs = torch.optim.Adagrad(nets[1].parameters(), foreach=False)
    for _ in range(3):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(net(torch.arange(20)).square().mean())
            optimizer.step()
        assert ours.last_step is not None
        assert ours.last_step.overlap == ""
    check_parameters([*nets[0].parameters()], [*nets[1].parameters()])
    ours.close()


def test_a_small_model(server: RunningServer) -> None:
    """A thread would take longer than what it hides."""
    net = nn.Linear(10, 10)
    optimizer = Adagrad(net.parameters(), server=server.url, overlap=True)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(net(torch.ones(2, 10)).sum())
        optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.overlap == ""
    optimizer.close()


def test_embedded_and_lbfgs_do_as_without(server: RunningServer) -> None:
    """They take the option, and watch nothing."""
    net = Net()
    SGD(net.parameters(), overlap=True)
    LBFGS(net.parameters(), server=server.url, overlap=True).close()
    assert hooks_of(net) == 0


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_go_with_the_optimizer(server: RunningServer) -> None:
    """close() removes them and ends the thread of a stream; so does an optimizer that nobody has any more."""
    net = Net()
    optimizer: RemoteOptimizer | None = None
    for way in ("close", "forget"):
        optimizer = Adagrad(net.parameters(), server=server.url, overlap=True)
        for seed in range(2):
            plain(net, optimizer, seed)
        assert hooks_of(net) == 8
        optimizer.zero_grad()
        backward(net, 3)
        assert len(senders()) == 1
        if way == "close":
            optimizer.close()
        optimizer = None
        gc.collect()
        assert hooks_of(net) == 0
        assert senders() == []


def test_copies_have_hooks_of_their_own(both: Both) -> None:
    """A copied model has none; a copied optimizer watches what it is over."""
    both.train(2)
    assert hooks_of(copy.deepcopy(both.here)) == 0
    assert hooks_of(copy.copy(both.here)) == 8  # the very same parameters
    network, optimizer = copy.deepcopy((both.here, both.ours))
    assert hooks_of(network) == hooks_of(both.here) == 8
    for seed in range(3):
        plain(network, optimizer, seed)
    assert optimizer.last_step is not None
    assert optimizer.last_step.overlap == STREAMED
    optimizer.close()
    both.train(2)
    both.check()


def test_parameters_that_come_later(server: RunningServer) -> None:
    """Those of a group that is added, and those that are thawed, are streamed from their second step on."""

    def freeze(network: Net) -> None:
        network.inner.requires_grad_(False)

    frozen = Both(server.url, prepare=freeze)
    late = [nn.Parameter(torch.ones(WIDTH)) for _ in range(2)]
    for p, optimizer in zip(late, (frozen.ours, frozen.theirs), strict=True):
        optimizer.add_param_group({"params": [p], "lr": 0.2})
    uses = {id(frozen.ours): late[0], id(frozen.theirs): late[1]}

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        if seed == 4:
            network.inner.requires_grad_(True)
        loss = loss_of(network, seed) + (uses[id(optimizer)] * seed).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()

    assert frozen.train(6, step) == ["", STREAMED, STREAMED, OTHERS, "", STREAMED]
    frozen.check(versions=7)
    check_parameters([late[0]], [late[1]])
    frozen.ours.close()


# -- the option ------------------------------------------------------------------------------------------------------


def test_the_option_and_its_variable() -> None:
    """It is off by default, on by either, and the argument wins; anything else is refused by name."""
    assert not resolve({}, {}).overlap
    assert resolve({"overlap": True}, {}).overlap
    assert resolve({}, {"FARSTEP_OVERLAP": "1"}).overlap
    assert not resolve({}, {"FARSTEP_OVERLAP": "0"}).overlap
    assert not resolve({"overlap": False}, {"FARSTEP_OVERLAP": "1"}).overlap
    with pytest.raises(InvalidOption, match="FARSTEP_OVERLAP"):
        resolve({}, {"FARSTEP_OVERLAP": "yes"})
    with pytest.raises(InvalidOption, match="overlap"):
        resolve({"overlap": 1}, {})  # type: ignore[typeddict-item]


def test_an_optimizer_that_is_moved(server: RunningServer) -> None:
    """farstep.remote takes the option as the constructors do."""
    net = Net()
    optimizer = farstep.remote(torch.optim.SGD(net.parameters(), lr=0.1), server=server.url, overlap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            plain(net, optimizer, seed)
    assert optimizer.last_step is not None
    assert optimizer.last_step.overlap == STREAMED
    optimizer.close()


def test_shared_memory_goes_first(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Over a unix socket gradients are put into shared memory in step(), and nothing is streamed."""
    with running_server("--unix", str(tmp_path_factory.mktemp("o") / "s"), loaded=True) as local:
        both = Both(local.unix)
        assert both.train(3) == ["", "", ""]
        assert both.ours.last_step is not None
        assert both.ours.last_step.path == "shared memory"
        both.check()
        both.ours.close()
