"""What networks and processes do to a step: it is applied once, or not at all, and the caller can tell and go on.

The oracle is torch's own optimizer. Adagrad is not linear in its gradients, so after n committed steps the parameters
equal n steps of torch with the same gradients and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import torch

from farstep.errors import Unavailable
from tests.support.client.carrying import Carrying
from tests.support.client.failing import SHAPES, SHORT_S, fail, step, twins_at
from tests.support.client.twins import Twins, check_parameters, drawn
from tests.support.faults import Network, Way
from tests.support.service.servers import RunningServer

# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A push is applied once, wherever its request or its answer is cut.", area="exactly once")
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


@pytest.mark.promise(
    "After a step that got no answer the next step finds out what became of it, and `last_step.earlier` says so.",
    area="exactly once",
)
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


@pytest.mark.promise(
    "After a step that got no answer the next step finds out what became of it, and `last_step.earlier` says so.",
    area="exactly once",
)
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


class Interrupting(Carrying):
    """Interrupt the caller in place of a push's answer."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.armed and request.url.path.endswith("/push"):
            super().handle_request(request).close()
            raise KeyboardInterrupt
        return super().handle_request(request)


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


class Late(Carrying):
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
                response = super().handle_request(self.kept)
                response.read()
                assert response.status_code == 200
        return super().handle_request(request)


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
