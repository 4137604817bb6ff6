"""Optimizers in the modes that let workers be late, slow or gone, and switches between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption, OptionsDiffer, Unavailable
from farstep.optim import SGD
from farstep.protocol.consistency import Consistency, to_options
from farstep.settings import RemoteOptions
from tests.support.service.servers import RunningServer

FRESH = itertools.count()


@pytest.fixture
def shared(server: RunningServer, talk: Conversation) -> Iterator[RemoteOptions]:
    """Name a session of our own on the server, and remove it afterwards."""
    name = f"modes-{next(FRESH)}"
    yield {"server": server.url, "session": name, "kernel": "reference"}
    talk.control("DELETE", f"/v1/sessions/{name}")


class Worker:
    """One parameter of four numbers, and its optimizer in a shared session: SGD with lr 1."""

    def __init__(self, shared: RemoteOptions, name: str, mode: Consistency) -> None:
        self.name = name
        self.parameter = torch.nn.Parameter(torch.zeros(4))
        place: RemoteOptions = {**shared, "worker": name, "consistency": mode}
        self.optimizer = SGD([self.parameter], lr=1.0, **place)

    def step(self, gradient: float) -> farstep.StepReport:
        self.parameter.grad = torch.full((4,), gradient)
        self.optimizer.step()
        report = self.optimizer.last_step
        assert report is not None
        return report

    @property
    def value(self) -> float:
        """Return what all four numbers are."""
        (value,) = set(self.parameter.tolist())
        return float(value)

    def waits(self, talk: Conversation) -> None:
        """Return when a push of this worker waits."""
        path = f"/v1/sessions/{self.optimizer.session}/workers/{self.name}"
        while not talk.control("GET", path)["waiting"]:
            pass


@pytest.mark.promise(
    "A worker that comes late with a quorum is told so, gets the present parameters, and goes on.",
    area="consistency modes",
)
def test_a_late_worker_goes_on_with_the_present_parameters(shared: RemoteOptions) -> None:
    """Its step says that it was late and not applied; its parameters are the session's, and its next step counts."""
    mode = farstep.Sync(workers=2, quorum=1)
    fast, slow = Worker(shared, "w0", mode), Worker(shared, "w1", mode)
    report = fast.step(1.0)
    assert (report.applied, report.divisor, report.contributors) == (True, 1, ("w0",))
    report = slow.step(2.0)
    assert (report.applied, report.reason, report.staleness, report.version) == (False, "late", 1, 1)
    assert slow.value == -1.0
    report = slow.step(2.0)
    assert (report.applied, report.reason, report.contributors) == (True, "", ("w1",))
    assert slow.value == -3.0


def test_a_stale_step_is_shorter_and_says_so(shared: RemoteOptions) -> None:
    """`last_step.weight` is what the learning rate was multiplied by."""
    mode = farstep.Async(staleness_scaling="inverse")
    fast, slow = Worker(shared, "w0", mode), Worker(shared, "w1", mode)
    assert fast.step(1.0).weight == 1.0
    assert slow.step(1.0).weight == 0.5
    assert slow.value == -1.5


def test_delays_are_compensated_from_where_a_worker_was(shared: RemoteOptions) -> None:
    """The session remembers what each worker pulled and what its steps brought: `g + l * g * g * (w_now - w_base)`."""
    mode = farstep.Async(delay_compensation=0.5)
    fast, slow = Worker(shared, "w0", mode), Worker(shared, "w1", mode)
    fast.step(1.0)
    assert slow.step(2.0).applied
    assert slow.value == -1.0 - (2.0 + 0.5 * 4.0 * (-1.0 - 0.0))
    fast.optimizer.pull()
    slow.step(1.0)
    assert fast.step(1.0).staleness == 1
    assert fast.value == -1.0 - 1.0 - (1.0 + 0.5 * (-2.0 - -1.0))


@pytest.mark.promise(
    "In `Bounded(staleness=S)` a worker that is too far ahead waits for the slowest live one.",
    area="consistency modes",
)
def test_a_fast_worker_waits_for_a_slow_one(shared: RemoteOptions, talk: Conversation) -> None:
    """In bounded mode it is held back at the bound, and goes on when the slow one has stepped, or has left."""
    mode = farstep.Bounded(staleness=0)
    fast, slow = Worker(shared, "w0", mode), Worker(shared, "w1", mode)
    fast.step(1.0)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(fast.step, 1.0)
        fast.waits(talk)
        assert slow.step(1.0).staleness == 1
        assert held.result().staleness == 1
        held = pool.submit(fast.step, 1.0)
        fast.waits(talk)
        slow.optimizer.close()
        assert held.result().applied
    assert fast.value == -4.0


@pytest.mark.promise(
    '`Sync(workers="live")` steps with the workers that are there, while they come and go.',
    area="consistency modes",
)
def test_workers_come_and_go_while_all_that_are_there_step_together(shared: RemoteOptions, talk: Conversation) -> None:
    """With workers="live" a step is divided by how many there are at the time."""
    mode = farstep.Sync(workers="live")
    first = Worker(shared, "w0", mode)
    assert first.step(1.0).divisor == 1
    second = Worker(shared, "w1", mode)
    assert second.value == -1.0
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.step, 1.0)
        first.waits(talk)
        assert second.step(3.0).contributors == ("w0", "w1")
        assert waiting.result().divisor == 2
    assert first.value == second.value == -3.0
    second.optimizer.close()
    assert first.step(1.0).divisor == 1


@pytest.mark.promise(
    "A running session switches its mode, and every worker learns of it with its next step.",
    area="consistency modes",
)
def test_a_switch_is_learned_by_all_workers(shared: RemoteOptions, talk: Conversation) -> None:
    """One worker switches; the other's step is taken in the new mode, and it knows the mode from then on."""
    first, second = Worker(shared, "w0", farstep.Async()), Worker(shared, "w1", farstep.Async())
    mode = farstep.Sync(workers=2, deadline_s=30.0)
    first.optimizer.set_consistency(mode)
    assert first.optimizer.consistency == mode
    assert to_options(second.optimizer.consistency) == {"mode": "async"}
    assert not getattr(second.optimizer, "_step_supports_amp_scaling", False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.step, 1.0)
        first.waits(talk)
        assert second.step(3.0).contributors == ("w0", "w1")
        waiting.result()
    assert second.optimizer.consistency == mode
    assert getattr(second.optimizer, "_step_supports_amp_scaling", False)
    assert not second.optimizer.rejoin()
    with pytest.raises(OptionsDiffer, match="Sync"):
        Worker(shared, "w2", farstep.Async())


def test_a_worker_that_did_not_know_of_a_switch_may_have_less_patience(
    shared: RemoteOptions, talk: Conversation
) -> None:
    """Its step, which waits for others now, ends with its own `timeout_s`; tried again it joins the push that waits."""
    first = Worker(shared, "w0", farstep.Async())
    second = Worker({**shared, "timeout_s": 0.5}, "w1", farstep.Async())
    first.optimizer.set_consistency(farstep.Sync(workers=2, deadline_s=30.0))
    with pytest.raises(Unavailable):
        second.step(3.0)
    second.waits(talk)
    assert second.value == 0.0
    assert first.step(1.0).contributors == ("w0", "w1")
    report = second.step(3.0)
    assert (report.version, report.contributors, report.duplicate) == (1, ("w0", "w1"), True)
    assert second.value == first.value == -2.0


def test_a_private_session_switches_too(place: RemoteOptions) -> None:
    """Alone, embedded or on a server, every mode that waits for nobody goes on as before."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = SGD([parameter], lr=1.0, **place)
    for mode in (farstep.Bounded(staleness=0), farstep.Sync(workers="live"), farstep.Sync(workers=1), farstep.Async()):
        optimizer.set_consistency(mode)
        assert optimizer.consistency == mode
        parameter.grad = torch.ones(2)
        optimizer.step()
    assert parameter.tolist() == [-4.0, -4.0]
    optimizer.close()


def test_an_embedded_session_refuses_to_wait_for_others() -> None:
    """A switch to several workers needs a server, and changes nothing."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(InvalidOption, match="needs a server"):
        optimizer.set_consistency(farstep.Sync(workers=2))
    assert optimizer.consistency == farstep.Async()


@pytest.mark.parametrize("given", ["sync", {"mode": "sync", "workers": 2}, farstep.Async], ids=["name", "map", "class"])
def test_what_is_no_mode_is_refused_by_name(given: Any, place: RemoteOptions) -> None:
    """At construction and in a switch alike, before anything is sent; the remedy shows what a mode is."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(InvalidOption, match=r"consistency.*farstep\.Async\(\)"):
        SGD([parameter], lr=1.0, **{**place, "consistency": given})
    optimizer = SGD([parameter], lr=1.0, **place)
    with pytest.raises(InvalidOption, match=r"consistency.*farstep\.Async\(\)"):
        optimizer.set_consistency(given)
    assert optimizer.consistency == farstep.Async()
    optimizer.close()
