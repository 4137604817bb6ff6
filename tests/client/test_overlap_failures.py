"""What becomes of a push that begins during the backward pass when something fails: it counts once, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from farstep.conversation import Conversation
from farstep.errors import NonFinite, Truncated, Unavailable
from farstep.overlap import BROKEN, OTHERS, STREAMED
from farstep.transport import StreamedBody
from tests.support.client.carrying import Carrying
from tests.support.client.overlapping import Both, Net, backward, loss_of, plain, wait_until_sent
from tests.support.faults import Network, Way
from tests.support.forks import in_a_fork
from tests.support.service.servers import RunningServer, running_server

Optimizer = torch.optim.Optimizer


class Deliberate(Exception):
    pass


def during_backward(network: Net, seed: int, do: Callable[[], None]) -> None:
    """Compute gradients, and do something after those of the head and before those of the layers in front of it."""

    def hook(gradient: Tensor) -> None:
        do()

    inputs = torch.zeros(1, requires_grad=True)
    inputs.register_hook(hook)  # type: ignore[no-untyped-call]
    layers = network.inner.register_forward_hook(lambda module, args, output: output + inputs)
    try:
        backward(network, seed)
    finally:
        layers.remove()


# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A push is applied once, wherever its request or its answer is cut.", area="exactly once")
@pytest.mark.parametrize("way", ["request", "response"])
def test_a_streamed_step_is_applied_once_wherever_it_is_cut(network: Network, way: Way) -> None:
    """A stream or its answer that is cut after any number of bytes is sent again as a whole, and counts once."""
    both = Both(network.url)
    both.train(2)
    before = network.moved[way]
    assert both.step().overlap == STREAMED
    length = network.moved[way] - before
    for after in [0, 1, 200, 400, *range(10_000, length, length // 7), length - 4096, length - 1]:
        (network.cut_request if way == "request" else network.cut_response)(after=after)
        both.step()
        assert network.faults_left == 0
        assert both.step().attempts == 1
    both.check()
    both.ours.close()


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_an_answer_that_was_lost_is_told(cuts: int, network: Network) -> None:
    """The whole push is repeated under its name, in the order of its stream, and is known as the same one."""
    both = Both(network.url)
    both.train(2)
    for _ in range(cuts):
        network.cut_response(after=0)
    report = both.step()
    assert (report.overlap, report.duplicate, report.attempts) == (STREAMED if cuts == 1 else BROKEN, True, cuts)
    assert network.faults_left == 0
    both.check()
    both.ours.close()


@pytest.mark.parametrize("again", [True, False])
def test_a_streamed_step_that_was_given_up(again: bool, network: Network) -> None:
    """Who steps again with the same gradients gets its receipt; who goes on learns that it was applied."""
    both = Both(network.url, timeout_s=0.5)
    both.train(2)
    network.cut_response(after=0, then_down=True)
    both.ours.zero_grad()
    backward(both.here, 3)
    with pytest.raises(Unavailable):
        both.ours.step()
    network.down = False
    if again:
        both.ours.step()
        assert both.ours.last_step is not None
        assert both.ours.last_step.duplicate
    plain(both.there, both.theirs, 3)
    both.steps = 3
    if not again:  # it has the parameters of before, and torch goes on from there too
        before = [p.detach().clone() for p in both.here.parameters()]
        both.ours.zero_grad()
        backward(both.here, 4)
        gradients = [None if p.grad is None else p.grad.clone() for p in both.here.parameters()]
        both.ours.step()
        assert both.ours.last_step is not None
        assert both.ours.last_step.earlier == "applied"
        for q, gradient in zip(both.there.parameters(), gradients, strict=True):
            q.grad = gradient
        both.theirs.step()
        both.steps = 4
        assert len(before) == len(gradients)
    both.check()
    both.train(3)
    both.check()
    both.ours.close()


# -- backward passes that fail ---------------------------------------------------------------------------------------


def test_a_backward_pass_that_fails(server: RunningServer, talk: Conversation) -> None:
    """The session is as it was, the sequence is free, and the steps that follow are as if nothing had been."""
    both = Both(server.url)
    both.train(3)

    def fail() -> None:
        wait_for_head(both)
        raise Deliberate

    both.ours.zero_grad()
    with pytest.raises(Deliberate):
        during_backward(both.here, 9, fail)
    page = talk.control("GET", f"/v1/sessions/{both.ours.session}/workers/{both.ours.worker}")
    assert page["sequence"] == 4  # the first parameters, and three steps
    both.train(3)
    both.check()
    both.ours.close()


def test_a_step_after_a_backward_pass_that_failed(server: RunningServer) -> None:
    """It pushes the gradients there are, which are not those that the stream had said."""
    both = Both(server.url)
    both.train(2)

    def fail() -> None:
        raise Deliberate

    def step(net: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        with pytest.raises(Deliberate):
            during_backward(net, seed, fail)
        assert [p.grad is None for p in net.inner.parameters()] == [True, True]
        optimizer.step()

    assert both.step(step).overlap == OTHERS
    both.check()
    both.ours.close()


def wait_for_head(both: Both) -> None:
    """Wait until a stream has begun to move."""
    begun = both.ours._membership.link._overlapping._current  # type: ignore[attr-defined]
    assert begun is not None
    with begun._moved:
        assert begun._moved.wait_for(lambda: begun._filled > 0, 30.0)


def test_gradients_that_are_not_finite(server: RunningServer) -> None:
    """The server refuses them by name when the stream is complete; nothing was applied."""
    both = Both(server.url)
    both.train(2)
    both.ours.zero_grad()
    torch.autograd.backward(loss_of(both.here, 7) * float("nan"))
    with pytest.raises(NonFinite, match="NaN"):
        both.ours.step()
    both.train(2)
    both.check(versions=4)
    assert both.step().overlap == STREAMED
    both.ours.close()


# -- servers that end, or lose their patience ------------------------------------------------------------------------


def test_a_server_that_is_killed_in_the_middle() -> None:
    """The step says that there is no answer; nothing has changed here, and a forgotten session is told."""
    with running_server(loaded=True) as mortal:
        both = Both(mortal.url, timeout_s=0.5)
        both.train(2)
        before = [p.detach().clone() for p in both.here.parameters()]
        both.ours.zero_grad()
        during_backward(both.here, 3, mortal.kill)
        with pytest.raises(Unavailable):
            both.ours.step()
        assert all(map(torch.equal, before, both.here.parameters()))
        mortal.restart()
        assert both.ours.rejoin(both.theirs.state_dict())
        both.train(3)
        both.check()
        both.ours.close()


class Impatient(Carrying):
    """Answer in a server's place that a streamed body came too slowly.

    Args:
        batches: how many of its batches to take before that; None for all of them.
    """

    def __init__(self, batches: int | None) -> None:
        super().__init__()
        self._batches = batches
        self.answered = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        stream = request.stream
        if not isinstance(stream, StreamedBody):
            return super().handle_request(request)
        made = stream.batches()
        for count, _ in enumerate(made):
            if count == self._batches:
                break
        made.close()
        self.answered += 1
        error = Truncated("No byte of the body came for 30 s.")
        problem = {"code": error.code, "title": error.code, "status": 400, "detail": error.detail, "side": "server"}
        headers = {"content-type": "application/problem+json"}
        return httpx.Response(400, headers=headers, content=json.dumps(problem))


@pytest.mark.parametrize("batches", [1, None])
def test_a_backward_pass_that_is_too_slow_for_the_server(batches: int | None, server: RunningServer) -> None:
    """A stream that the server gave up, early or at its end, is sent as a whole in step(), which does not fail."""
    transport = Impatient(batches)
    both = Both(server.url, transport=transport)

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        backward(network, seed)
        if batches is not None:
            wait_until_sent(optimizer)
        optimizer.step()

    outcomes = both.train(2, step)
    assert outcomes == ["", BROKEN]
    assert transport.answered == 1
    with pytest.warns(UserWarning, match="30 s"):
        both.train(1, step)
    assert transport.answered == 2
    both.check()
    both.ours.close()


# -- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")  # a fork has no other threads
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_leaves_the_stream_to_its_parent(server: RunningServer, tmp_path: Path) -> None:
    """A child that computes gradients and pulls does not touch what its parent is sending."""
    both = Both(server.url)
    both.train(3)
    both.steps += 1
    both.ours.zero_grad()
    both.theirs.zero_grad()
    backward(both.here, both.steps)
    backward(both.there, both.steps)

    def pull() -> None:
        both.ours.zero_grad()
        backward(both.here, 77)
        both.ours.pull()

    assert in_a_fork(pull) == 0
    both.ours.step()
    both.theirs.step()
    assert both.ours.last_step is not None
    assert both.ours.last_step.overlap == STREAMED
    both.check()
    both.ours.close()
