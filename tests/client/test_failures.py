"""What networks and processes do to a step: it is applied once, or not at all, and the caller can tell and go on.

The oracle is torch's own optimizer. Adagrad is not linear in its gradients, so after n committed steps the parameters
equal n steps of torch with the same gradients and nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from farstep.conversation import Conversation
from farstep.errors import FarstepError, InvalidRequest, NonFinite, SessionLost, Unauthorized, Unavailable
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from farstep.transport import SocketTransport
from tests.client.twins import Twins, check_parameters, drawn, parameters
from tests.faults import Network, Way, faulty
from tests.service.servers import TOKEN, RunningServer, running_server

SHAPES = [(3, 4), (5,)]
SHORT_S = 1.0
"""Long enough for a busy machine to answer, short enough to wait for."""


@pytest.fixture
def network(server: RunningServer) -> Iterator[Network]:
    """Put a network of our own in front of the server."""
    with faulty(server.port) as between:
        yield between


def twins_at(url: str, **remote: object) -> Twins:
    """Return an Adagrad on a server and torch's, over two small parameters."""
    place: RemoteOptions = {"kernel": "reference", "server": url, **remote}  # type: ignore[typeddict-item]
    return Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, SHAPES))


def step(twins: Twins, seed: int) -> None:
    twins.step(drawn(seed, SHAPES))


def fail(twins: Twins, seed: int, kind: type[BaseException] = Unavailable) -> pytest.ExceptionInfo[BaseException]:
    """Let our step fail with nothing changed on this side; torch does not take it."""
    before = [p.detach().clone() for p in twins.here]
    version = twins.ours.version
    twins.give(drawn(seed, SHAPES))
    with pytest.raises(kind) as failed:
        twins.ours.step()
    check_parameters(twins.here, before)
    assert twins.ours.version == version
    return failed


# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["request", "response"])
def test_a_step_is_applied_once_wherever_it_is_cut(network: Network, way: Way) -> None:
    """A request or an answer that is cut after any number of bytes is tried again, and counts once."""
    twins = twins_at(network.url)
    before = dict(network.moved)
    step(twins, 1)
    length = (
        network.moved["request" if way == "request" else "response"]
        - before["request" if way == "request" else "response"]
    )
    cut = network.cut_request if way == "request" else network.cut_response
    steps = 1
    for after in sorted({*range(0, length, 23), 1, length - 1, length}):
        cut(after=after)
        steps += 1
        step(twins, steps)
        check_parameters(twins.here, twins.there)
        assert twins.ours.version == steps
    step(twins, steps + 1)
    assert network.faults_left == 0
    twins.check()


def test_several_faults_in_a_row(network: Network) -> None:
    """A step survives a cut request, a lost answer, a cut answer and a silent server, one after the other."""
    twins = twins_at(network.url, timeout_s=4.0)
    step(twins, 1)
    network.cut_request(after=200)
    network.cut_response(after=0)
    network.cut_response(after=150)
    network.swallow_response()
    step(twins, 2)
    assert network.faults_left == 0
    step(twins, 3)
    assert twins.ours.version == 3
    twins.check()


def test_a_lost_answer_is_told(network: Network) -> None:
    """The report of a step whose answers were lost says that it was tried again and had been applied before."""
    twins = twins_at(network.url)
    for _ in range(3):
        network.cut_response(after=0)
    step(twins, 1)
    report = twins.ours.last_step
    assert report is not None
    assert (report.version, report.duplicate, report.applied, report.earlier) == (1, True, True, None)
    assert report.attempts > 1
    step(twins, 2)
    again = twins.ours.last_step
    assert again is not None
    assert (again.version, again.duplicate, again.attempts) == (2, False, 1)
    twins.check()


def test_joining_reading_and_loading_survive_cuts(network: Network) -> None:
    """Not only steps: joining, sending the first parameters, pulling and moving state are tried again."""
    faults: list[Callable[[], None]] = [
        lambda: network.cut_response(after=10),
        lambda: network.cut_request(after=300),
    ]
    for fault in faults:
        fault()
        twins = twins_at(network.url)
        step(twins, 1)
        fault()
        state = twins.ours.state_dict()
        fault()
        twins.ours.load_state_dict(state)
        fault()
        twins.ours.pull()
        step(twins, 2)
        twins.check()


# -- unknown outcomes ------------------------------------------------------------------------------------------------


def give_up(twins: Twins, network: Network, seed: int, *, applied: bool) -> None:
    """Let a step end without an answer, and the server have got it or not; torch does not take it yet."""
    if applied:
        network.cut_response(after=0, then_down=True)
    else:
        network.down = True
    fail(twins, seed)
    assert network.down
    network.down = False


@pytest.mark.parametrize("applied", [True, False])
def test_a_step_tried_again_after_it_was_given_up_counts_once(network: Network, applied: bool) -> None:
    """step() again with the same gradients repeats the push, whether the server had applied it or not."""
    twins = twins_at(network.url, timeout_s=SHORT_S)
    step(twins, 1)
    give_up(twins, network, 2, applied=applied)
    step(twins, 2)
    report = twins.ours.last_step
    assert report is not None
    assert (report.version, report.duplicate, report.earlier) == (2, applied, None)
    step(twins, 3)
    assert twins.ours.version == 3
    twins.check()


@pytest.mark.parametrize("applied", [True, False])
def test_going_on_after_a_step_was_given_up(network: Network, applied: bool) -> None:
    """With other gradients the next step is a new one, and its report tells what became of the one before."""
    twins = twins_at(network.url, timeout_s=SHORT_S)
    step(twins, 1)
    give_up(twins, network, 2, applied=applied)
    if applied:
        twins.theirs.step()
    step(twins, 3)
    report = twins.ours.last_step
    assert report is not None
    assert report.earlier == ("applied" if applied else "dropped")
    assert (report.version, report.duplicate, report.staleness) == (3, False, 1) if applied else (2, False, 0)
    step(twins, 4)
    assert twins.ours.last_step is not None
    assert twins.ours.last_step.earlier is None
    twins.check()


@pytest.mark.parametrize("applied", [True, False])
def test_changed_options_of_a_step_that_was_given_up(network: Network, applied: bool) -> None:
    """A learning rate that may or may not have arrived is sent again, also when it is back at its old value."""
    twins = twins_at(network.url, timeout_s=SHORT_S)
    step(twins, 1)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"] = 0.7
    give_up(twins, network, 2, applied=applied)
    if applied:
        twins.theirs.step()
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"] = 0.1
    step(twins, 3)
    twins.check()


def test_edited_parameters_are_not_sent_twice(network: Network) -> None:
    """An edit that arrived before the step was given up does not undo that step when it is tried again."""
    twins = twins_at(network.url, timeout_s=SHORT_S)
    step(twins, 1)
    before = network.moved["response"]
    with torch.no_grad():
        for p in (*twins.here, *twins.there):
            p.mul_(0.5)
    step(twins, 2)  # two answers, to the edit and to the push
    answers = network.moved["response"]
    step(twins, 3)
    push_bytes = network.moved["response"] - answers
    both_bytes = answers - before
    with torch.no_grad():
        for p in (*twins.here, *twins.there):
            p.mul_(0.5)
    network.cut_response(after=both_bytes - push_bytes + 1, then_down=True)
    edited = [p.detach().clone() for p in twins.here]
    twins.give(drawn(4, SHAPES))
    with pytest.raises(Unavailable, match="Pushing"):
        twins.ours.step()
    check_parameters(twins.here, edited)
    network.down = False
    step(twins, 4)
    assert twins.ours.last_step is not None
    assert twins.ours.last_step.duplicate
    twins.check()


class Meddling(httpx.BaseTransport):
    """Carry requests, and let a test have its way with pushes while it is `armed`."""

    def __init__(self) -> None:
        self._inner = SocketTransport()
        self.armed = False

    def close(self) -> None:
        self._inner.close()


class Interrupting(Meddling):
    """Interrupt the caller in place of a push's answer."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.armed and request.url.path.endswith("/push"):
            self._inner.handle_request(request).close()
            raise KeyboardInterrupt
        return self._inner.handle_request(request)


def test_an_interrupt_from_the_keyboard_in_the_middle_of_a_step(server: RunningServer) -> None:
    """A step that was interrupted after the server had it is known as unknown, and training goes on."""
    transport = Interrupting()
    twins = twins_at(server.url, transport=transport)
    step(twins, 1)
    for seed in (2, 4):
        transport.armed = True
        fail(twins, seed, KeyboardInterrupt)
        twins.theirs.step()
        transport.armed = False
        step(twins, seed + 1)
    assert twins.ours.version == 5
    twins.check()


class Late(Meddling):
    """Keep the first push back and deliver it just before the next one, as a network with a long way round does."""

    kept: httpx.Request | None = None
    delivered = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/push"):
            if self.armed:
                content = b"".join(bytes(piece) for piece in request.stream)  # type: ignore[union-attr]
                headers = {key: value for key, value in request.headers.items() if key != "content-length"}
                self.kept = httpx.Request("POST", request.url, headers=headers, content=content)
                raise httpx.ReadTimeout("nothing came back")
            if self.kept is not None and not self.delivered:
                self.delivered = True
                response = self._inner.handle_request(self.kept)
                response.read()
                assert response.status_code == 200
        return self._inner.handle_request(request)


def test_a_push_that_arrives_after_it_was_given_up(server: RunningServer) -> None:
    """Both steps count, once each, when the server takes the first one after it was asked for it."""
    transport = Late()
    twins = twins_at(server.url, transport=transport, timeout_s=SHORT_S)
    step(twins, 1)
    transport.armed = True
    fail(twins, 2)
    transport.armed = False
    twins.theirs.step()
    step(twins, 3)
    assert transport.delivered
    report = twins.ours.last_step
    assert report is not None
    assert (report.version, report.earlier) == (3, "applied")
    step(twins, 4)
    twins.check()


# -- servers that are not there --------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[int]:
    """Return a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


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
    with running_server(token=TOKEN) as running:
        yield running


@pytest.mark.parametrize("token", [None, "fedcba9876543210fedcba9876543210"])
def test_a_wrong_token_or_none(mortal: RunningServer, token: str | None) -> None:
    """The server's refusal comes at once, as an error of its own kind that shows no token."""
    with pytest.raises(Unauthorized) as refused:
        Adagrad(parameters(drawn(0)), server=mortal.url, token=token)
    assert "fedcba" not in str(refused.value)


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
    assert twins.ours.rejoin(version=40)
    assert twins.ours.version == 40
    fresh = Twins("Adagrad", {"lr": 0.1}, {"kernel": "reference"}, start=twins.here)
    for seed in (2, 3):
        step(fresh, seed)
        step(twins, seed)
    check_parameters(twins.here, fresh.here)
    assert twins.ours.version == 42


# -- gradients that are refused --------------------------------------------------------------------------------------


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
