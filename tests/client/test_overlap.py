"""Pushes that begin during the backward pass: torch's bits in every training, streamed where that is right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.optim import Optimizer

import farstep
from farstep.optim import SGD, RemoteOptimizer
from farstep.overlap import AGAIN, STREAMED
from farstep.protocol.consistency import Sync
from tests.support.client.overlapping import Both, Net, backward, hooks_of, loss_of, plain
from tests.support.client.twins import check_parameters
from tests.support.service.servers import RunningServer

# -- what is streamed ------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "`overlap=True` sends gradients during the backward pass and changes no bit of the result.",
    area="bits of torch",
)
@pytest.mark.parametrize("name", ["Adagrad", "Adamax", "SGD", "AdamW"])
def test_a_training_has_torchs_bits(name: str, server: RunningServer) -> None:
    """After a step that shows the order every step is streamed, with a shared matrix and one that is never used."""
    both = Both(server.url, name)
    assert both.train(6) == ["", *[STREAMED] * 5]
    report = both.ours.last_step
    assert report is not None
    assert (report.attempts, report.path, report.duplicate) == (1, "bodies", False)
    assert (
        0
        <= report.bytes_overlapped
        < report.bytes_sent
        == sum(p.nbytes for p in both.here.parameters() if p.grad is not None)
    )
    both.check()
    both.ours.close()


def test_it_is_off_unless_asked_for(server: RunningServer) -> None:
    """Without the option there is no hook, and nothing is begun early."""
    both = Both(server.url, overlap=False)
    assert both.train(3) == ["", "", ""]
    assert hooks_of(both.here) == 0
    with both.ours.no_sync():
        both.step()
    both.check()


@pytest.mark.parametrize("wire", ["bf16", farstep.Wire(parameters="fp16")])
def test_gradients_in_16_bits(wire: object, server: RunningServer) -> None:
    """What is streamed is narrowed as it would be in step()."""
    streamed, whole = Both(server.url, wire=wire), Both(server.url, wire=wire, overlap=False)
    assert streamed.train(4) == ["", *[STREAMED] * 3]
    whole.train(4)
    check_parameters([*streamed.here.parameters()], [*whole.here.parameters()])


def test_float16_gradients_are_looked_at_first(server: RunningServer) -> None:
    """They are not streamed: one that float16 makes infinite must not reach the server."""
    assert Both(server.url, wire="fp16").train(3) == ["", "", ""]


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_gradients_that_are_not_in_rows(both: Both) -> None:
    """A gradient that is a transposed view travels as it shows."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        if seed == 1:
            network.inner.weight.grad = torch.zeros_like(network.inner.weight).t().contiguous().t()
        backward(network, seed)
        assert network.inner.weight.grad is not None
        assert not network.inner.weight.grad.is_contiguous()
        optimizer.step()

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()


def test_workers_of_a_sync_session(server: RunningServer) -> None:
    """Two workers stream their gradients, which are averaged in the order of their names."""
    nets = [Net(), Net()]
    ours = [
        SGD(
            net.parameters(), 0.1, server=server.url, session="overlapping", worker=f"w{i}", kernel="reference",
            consistency=Sync(workers=2), overlap=True,
        )
        for i, net in enumerate(nets)
    ]  # fmt: skip
    oracle = Net()
    theirs = SGD(oracle.parameters(), 0.1, kernel="reference")
    with ThreadPoolExecutor(2) as threads:
        for seed in range(4):
            for i, (net, optimizer) in enumerate(zip(nets, ours, strict=True)):
                optimizer.zero_grad()
                backward(net, 2 * seed + i)
            sums = [
                None if p.grad is None or q.grad is None else (p.grad + q.grad) / 2
                for p, q in zip(*(net.parameters() for net in nets), strict=True)
            ]
            list(threads.map(lambda each: each.step(), ours))
            for p, mean in zip(oracle.parameters(), sums, strict=True):
                p.grad = mean
            theirs.step()
            for net in nets:
                check_parameters([*net.parameters()], [*oracle.parameters()])
    assert [each.last_step.overlap for each in ours if each.last_step] == [STREAMED] * 2
    for each in ours:
        each.close()


def test_a_closure(both: Both) -> None:
    """A backward pass inside of step() is streamed as well."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            loss = loss_of(network, seed)
            torch.autograd.backward(loss)
            return loss.item()

        optimizer.step(closure)

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()


def test_a_schedule(both: Both) -> None:
    """A learning rate that changes between steps travels with the stream."""
    schedules = {id(each): torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (both.ours, both.theirs)}

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        plain(network, optimizer, seed)
        schedules[id(optimizer)].step()

    assert both.train(5, step) == ["", *[STREAMED] * 4]
    both.check()


# -- several backward passes -----------------------------------------------------------------------------------------


def test_accumulation_is_learnt(both: Both) -> None:
    """A loop that accumulates three times in each step is streamed in the third backward pass, without being told."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(3):
            backward(network, 10 * seed + part)
        optimizer.step()

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()


def test_accumulation_that_is_irregular_can_be_said(both: Both) -> None:
    """Backward passes inside no_sync() are not streamed, however many there are; the one that follows is."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(seed % 3):
            if isinstance(optimizer, RemoteOptimizer):
                with optimizer.no_sync():
                    backward(network, 10 * seed + part)
            else:
                backward(network, 10 * seed + part)
        backward(network, seed)
        optimizer.step()

    assert both.train(6, step) == ["", *[STREAMED] * 5]
    both.check()


def test_one_more_backward_pass_than_before(both: Both) -> None:
    """A stream whose gradients are accumulated again is ended, and the next step knows better."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(1 if seed < 3 else 2):
            backward(network, 10 * seed + part)
        optimizer.step()

    assert both.train(5, step) == ["", STREAMED, AGAIN, STREAMED, STREAMED]
    both.check()


def test_one_backward_pass_less_than_before(both: Both) -> None:
    """Nothing is streamed then, and the step is an ordinary one."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(2 if seed < 3 else 1):
            backward(network, 10 * seed + part)
        optimizer.step()

    assert both.train(5, step) == ["", STREAMED, "", STREAMED, STREAMED]
    both.check()


def test_two_losses_and_gradients_of_gradients(both: Both) -> None:
    """Graphs that are kept, and gradients that have one, are streamed when the last of them has been added."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        loss = loss_of(network, seed)
        torch.autograd.backward(loss, retain_graph=True)
        norms = [g.square().sum() for g in torch.autograd.grad(loss, [network.inner.weight], create_graph=True)]
        torch.autograd.backward(0.1 * norms[0])
        optimizer.step()

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()
