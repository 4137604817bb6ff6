"""Servers that are not there, hang, die, ask for a token or refuse what they get: parameters stay as they are."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from farstep.conversation import Conversation
from farstep.errors import FarstepError, InvalidRequest, NonFinite, SessionLost, Unauthorized, Unavailable
from farstep.optim import Adagrad
from tests.support.client.failing import SHAPES, SHORT_S, fail, step, twins_at
from tests.support.client.twins import Twins, check_parameters, drawn, parameters
from tests.support.service.servers import TOKEN, RunningServer, running_server

# -- servers that are not there --------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[int]:
    """Return a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.promise(
    "A server that does not answer is `Unavailable` after `timeout_s`, and the parameters are as they were.",
    area="client errors",
)
def test_a_server_that_is_not_there(nobody: int) -> None:
    """The error comes after the stated time, and names the server, the time and what to do."""
    began = time.monotonic()
    with pytest.raises(
        Unavailable, match=rf"127\.0\.0\.1:{nobody} gave no answer within 0\.5 s.*farstep serve"
    ) as gone:
        Adagrad(parameters(drawn(0)), server=f"http://127.0.0.1:{nobody}", timeout_s=0.5)
    assert gone.value.side == "client"
    assert "nothing accepts connections" in str(gone.value)
    assert 0.2 < time.monotonic() - began < 5


def test_something_else_that_answers() -> None:
    """A server that is not ours is recognised by its answer, at once; a proxy without its server is tried again."""

    def answering(status: int, text: str) -> httpx.MockTransport:
        return httpx.MockTransport(lambda request: httpx.Response(status, text=text))

    cases: list[tuple[int, str, type[FarstepError]]] = [
        (200, "<html>hello</html>", InvalidRequest),
        (404, "not found", InvalidRequest),
        (302, "", InvalidRequest),
        (401, "who are you", Unauthorized),
        (502, "bad gateway", Unavailable),
        (503, "", Unavailable),
    ]
    for status, text, kind in cases:
        with pytest.raises(kind):
            Adagrad(parameters(drawn(0)), server="http://box", timeout_s=0.2, transport=answering(status, text))


@pytest.mark.promise(
    "A server that does not answer is `Unavailable` after `timeout_s`, and the parameters are as they were.",
    area="client errors",
)
def test_a_server_that_hangs(server: RunningServer) -> None:
    """A server that is stopped, but keeps the connection, is given up in time; what it took counts once."""
    twins = twins_at(server.url, timeout_s=SHORT_S)
    step(twins, 1)
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        fail(twins, 2)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert time.monotonic() - began < 5
    while True:
        try:
            step(twins, 2)
            break
        except Unavailable:  # it may need a moment to come back
            continue
    assert twins.ours.version == 2
    step(twins, 3)
    twins.check()


# -- servers that die, and those that ask for a token ----------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal() -> Iterator[RunningServer]:
    """Run a server that asks for a token, and that tests may kill."""
    with running_server(token=TOKEN, loaded=True) as running:
        yield running


@pytest.mark.parametrize("token", [None, "fedcba9876543210fedcba9876543210"])
def test_a_wrong_token_or_none(mortal: RunningServer, token: str | None) -> None:
    """The server's refusal comes at once, as an error of its own kind that shows no token."""
    with pytest.raises(Unauthorized) as refused:
        Adagrad(parameters(drawn(0)), server=mortal.url, token=token)
    assert "fedcba" not in str(refused.value)


@pytest.mark.promise(
    "After a server was killed its sessions are lost and said to be: a name is never silently another session.",
    area="start and shutdown",
)
def test_a_server_that_is_killed_and_started_again(mortal: RunningServer) -> None:
    """The session is lost and said to be; the model stays as it was, and goes on from a checkpoint like torch."""
    twins = twins_at(mortal.url, token=TOKEN, timeout_s=SHORT_S)
    for seed in range(1, 5):
        step(twins, seed)
    twins.ours.param_groups[0]["lr"] = twins.theirs.param_groups[0]["lr"] = 0.03
    step(twins, 5)
    checkpoint = twins.ours.state_dict()

    mortal.kill()
    failed = fail(twins, 6)
    assert f"gave no answer within {SHORT_S:g} s" in str(failed.value)
    fail(twins, 6)

    with ThreadPoolExecutor() as threads:
        # Nobody listens yet: a worker that starts together with its server waits for it.
        early = threads.submit(Adagrad, parameters(drawn(9)), server=mortal.url, token=TOKEN, timeout_s=60.0)
        mortal.restart()
    assert early.result().version == 0

    for call in (twins.ours.state_dict, twins.ours.pull):
        with pytest.raises(SessionLost, match=r"held version 5.*rejoin"):
            call()
    fail(twins, 6, SessionLost)
    assert twins.ours.rejoin(checkpoint)
    assert twins.ours.version == 5
    twins.check()
    for seed in range(6, 9):
        step(twins, seed)
    assert twins.ours.version == 8
    twins.check()


def test_rejoining_at_another_version(mortal: RunningServer) -> None:
    """A session can be created anew at the version of the checkpoint, and without a checkpoint its state is fresh."""
    twins = twins_at(mortal.url, token=TOKEN)
    step(twins, 1)
    talk = Conversation(mortal.url, TOKEN)
    talk.control("DELETE", f"/v1/sessions/{twins.ours.session}")
    talk.close()
    fail(twins, 2, SessionLost)
    with pytest.warns(UserWarning, match="without optimizer state"):
        assert twins.ours.rejoin(version=40)
    assert twins.ours.version == 40
    fresh = Twins("Adagrad", {"lr": 0.1}, {"kernel": "reference"}, start=twins.here)
    for seed in (2, 3):
        step(fresh, seed)
        step(twins, seed)
    check_parameters(twins.here, fresh.here)
    assert twins.ours.version == 42


# -- gradients that are refused --------------------------------------------------------------------------------------


@pytest.mark.promise("A refused push uses no sequence number: the next good one goes under it.", area="exactly once")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_refused(server: RunningServer, bad: float) -> None:
    """The error names tensor and worker, nothing has changed, and the next step works under the same sequence."""
    twins = twins_at(server.url, worker="w7")
    step(twins, 1)
    gradients = drawn(2, SHAPES)
    gradients[1][3] = bad
    before = [p.detach().clone() for p in twins.here]
    for p, g in zip(twins.here, gradients, strict=True):
        p.grad = g
    with pytest.raises(NonFinite, match=r"'0\.1' from worker 'w7'") as refused:
        twins.ours.step()
    assert refused.value.field == "0.1"
    check_parameters(twins.here, before)
    assert twins.ours.version == 1
    step(twins, 2)
    assert twins.ours.version == 2
    twins.check()


def test_a_gradient_that_is_not_finite_embedded() -> None:
    """Embedded it is taken, as torch takes it, unless the policy is to refuse."""
    twins = Twins("Adagrad", {}, {"kernel": "reference"}, start=drawn(0, SHAPES))
    twins.step([torch.full((3, 4), float("nan")), torch.ones(5)])
    twins.check()
    refusing = Twins("Adagrad", {}, {"kernel": "reference", "nonfinite": "refuse"}, start=drawn(0, SHAPES))
    with pytest.raises(NonFinite, match=r"'0\.0'"):
        refusing.step([torch.full((3, 4), float("nan")), torch.ones(5)])
    assert refusing.ours.version == 0
    step(refusing, 1)
    refusing.check()


def test_an_option_that_the_server_refuses(server: RunningServer) -> None:
    """A group option of a wrong type is refused with the step, and the next step works."""
    twins = twins_at(server.url)
    twins.ours.param_groups[0]["lr"] = "fast"
    fail(twins, 1, ValueError)
    twins.ours.param_groups[0]["lr"] = 0.1
    step(twins, 1)
    twins.check()
