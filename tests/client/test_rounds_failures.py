"""What a failed synchronisation leaves of a round, and how a round is gone on with later."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import farstep
from farstep.errors import BarrierTimeout, FarstepError, Fenced, NonFinite, SessionLost, Unavailable
from farstep.local_sgd.rounds import Rounds
from farstep.settings import RemoteOptions
from tests.support.client.rounds import EVERY, Simulation, Worker, diloco, local_sgd
from tests.support.client.twins import check_equal, check_parameters
from tests.support.client.workers import synced
from tests.support.faults import Network
from tests.support.service.servers import RunningServer, running_server

SHORT_S = 1.0


@pytest.fixture
def mortal() -> Iterator[RunningServer]:
    """Run a server that a test may kill."""
    with running_server(loaded=True) as running:
        yield running


def resumed(worker: Worker, place: RemoteOptions) -> Worker:
    """Return a worker in a later process: a copy of model and inner optimizer, and the rounds' state loaded."""
    later = Worker(diloco, place, worker.number, seed=9)
    later.taken = worker.taken
    later.model.load_state_dict(worker.model.state_dict())
    later.inner.load_state_dict(worker.inner.state_dict())
    later.rounds.load_state_dict(worker.rounds.state_dict())
    return later


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_barrier_that_is_not_completed_changes_nothing(shared: RemoteOptions, threads: ThreadPoolExecutor) -> None:
    """The model and the count stay; the next step tries again, with itself in what is sent."""
    place = synced(shared, 2, deadline_s=0.3)
    workers = [Worker(diloco, place, number) for number in range(2)]
    reference = Simulation(diloco, 2)
    with workers[0].rounds as rounds, workers[1].rounds:
        with pytest.raises(BarrierTimeout, match="missing: w1"):
            workers[0].train(EVERY)
        reference.local(0, EVERY)
        check_parameters(workers[0].parameters, reference.models[0])
        assert (rounds.local_step, rounds.version) == (EVERY, 0)
        workers[1].train(EVERY - 1)
        reference.local(1, EVERY)
        reference.local(0, 1)
        for done in [threads.submit(each.train, 1) for each in workers]:
            done.result()
        reference.step([reference.delta(number, reference.bases) for number in range(2)])
        reference.take(0)
        for each in workers:
            check_parameters(each.parameters, reference.models[0])
        assert (rounds.local_step, rounds.version) == (0, 1)


def test_a_difference_that_comes_too_late_is_gone(shared: RemoteOptions) -> None:
    """Where one worker is enough for a step, who is late takes the session's parameters, and a round begins."""
    place: RemoteOptions = {**shared, "consistency": farstep.Sync(workers=2, quorum=1)}
    workers = [Worker(diloco, place, number) for number in range(2)]
    reference = Simulation(diloco, 1)
    with workers[0].rounds, workers[1].rounds as late:
        workers[0].train(EVERY)
        reference.round()
        workers[1].train(EVERY)
        report = late.last_sync
        assert report is not None
        assert (report.applied, report.reason) == (False, "late")
        assert (late.local_step, late.version) == (0, 1)
        check_parameters(workers[1].parameters, reference.models[0])


def test_a_worker_whose_name_was_taken_may_take_it_back(shared: RemoteOptions) -> None:
    """Its round is given up: rejoining brings the session's parameters, and the other one is fenced."""
    first, second = Worker(diloco, shared), Worker(diloco, shared)
    reference = Simulation(diloco, 1)
    with first.rounds, second.rounds:
        with pytest.raises(Fenced):
            first.train(EVERY)
        second.train(EVERY)
        reference.round()
        assert not first.rounds.rejoin()
        assert (first.rounds.local_step, first.rounds.version) == (0, 1)
        check_parameters(first.parameters, reference.models[0])
        with pytest.raises(Fenced):
            second.train(EVERY)


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("rescheduled", [True, False])
def test_a_synchronisation_without_an_answer_counts_once(
    network: Network, applied: bool, more: int, rescheduled: bool
) -> None:
    """Tried again it is the same push, whether the server had it or not; steps and rates since then count after it."""
    worker = Worker(local_sgd, {"server": network.url, "timeout_s": SHORT_S, "kernel": "reference"})
    reference = Simulation(local_sgd, 1)
    with worker.rounds as rounds:
        if applied:
            network.cut_response(after=0, then_down=True)
        else:
            network.down = True
        with pytest.raises(Unavailable):
            worker.train(EVERY)
        reference.round()
        sent = worker.values
        assert (rounds.local_step, rounds.version) == (EVERY, 0)
        for _ in range(more):
            with pytest.raises(Unavailable):
                worker.train()
        since = [now - then for now, then in zip(worker.values, sent, strict=True)]
        if rescheduled:
            rounds.outer.param_groups[0]["lr"] = 0.5
        network.down = False
        report = rounds.sync()
        assert (report.version, report.duplicate, rounds.local_step) == (1, applied, more)
        assert rounds.outer.param_groups[0]["lr"] == (0.5 if rescheduled else 1.0)
        expected = [base.detach() + own for base, own in zip(reference.bases, since, strict=True)]
        check_equal(worker.values, expected, exact=not more)
        rounds.pull()
        check_parameters(worker.parameters, reference.bases)


def test_a_model_that_went_to_infinity_is_brought_back(shared: RemoteOptions) -> None:
    """A pseudo-gradient with NaN is refused by name; `pull()` gives the round up and takes the session's parameters."""
    worker = Worker(local_sgd, {**shared, "nonfinite": "refuse"})
    with worker.rounds as rounds:
        begin = worker.values
        worker.train(EVERY - 1)
        with torch.no_grad():
            worker.parameters[0].fill_(torch.nan)
        with pytest.raises(NonFinite, match="p0"):
            worker.train()
        assert rounds.pull() == 0
        check_equal(worker.values, begin)
        assert rounds.local_step == 0
        worker.train(EVERY)
        assert rounds.version == 1


def test_a_difference_that_the_wire_cannot_carry_is_not_tried_for_ever(shared: RemoteOptions) -> None:
    """It was never sent, so what is sent next is the difference as it is by then."""
    worker = Worker(local_sgd, {**shared, "wire": "fp16"}, every=1)
    with worker.rounds as rounds:
        before = worker.values
        with torch.no_grad():
            worker.parameters[0].add_(1e6)
        with pytest.raises(NonFinite, match="beyond 65504"):
            rounds.sync()
        with torch.no_grad():
            worker.parameters[0].copy_(before[0] + 1.0)
        assert rounds.sync().applied
        torch.testing.assert_close(worker.values[0], before[0] + 1.0, rtol=1e-3, atol=1e-3)


def test_rejoining_after_the_session_was_lost(mortal: RunningServer) -> None:
    """A session that is created anew goes on with the round; a worker that finds it there begins one."""
    place: RemoteOptions = {"server": mortal.url, "session": "shared", "kernel": "reference"}
    workers = [Worker(diloco, place, number) for number in range(2)]
    reference = Simulation(diloco, 1)
    with workers[0].rounds as rounds, workers[1].rounds:
        workers[0].train(EVERY)
        reference.round()
        state = rounds.state_dict()
        mortal.kill()
        mortal.restart()
        with pytest.raises(SessionLost):
            workers[0].train(EVERY)
        assert rounds.rejoin(state)
        assert (rounds.local_step, rounds.version) == (EVERY, 1)
        rounds.sync()
        reference.round()
        check_parameters(workers[0].parameters, reference.models[0])
        with pytest.raises(SessionLost):
            workers[1].train(EVERY)
        assert not workers[1].rounds.rejoin()
        assert workers[1].rounds.local_step == 0
        check_parameters(workers[1].parameters, reference.models[0])


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lives_on", [True, False])
def test_a_round_is_gone_on_with_in_a_later_process(shared: RemoteOptions, lives_on: bool) -> None:
    """With the states of model, inner optimizer and rounds a training goes on bit for bit, in a session old or new."""
    worker, reference = Worker(diloco, shared), Simulation(diloco, 1)
    with worker.rounds:
        worker.train(EVERY + 2)
    place = shared if lives_on else RemoteOptions(**{**shared, "session": f"{shared['session']}-2"})
    later = resumed(worker, place)
    worker.rounds.close()
    with later.rounds as rounds:
        assert rounds.local_step == 2
        later.train(EVERY + 1)
        for _ in range(3):
            reference.round()
        check_parameters(later.parameters, reference.models[0])
        assert rounds.version == (3 if lives_on else 2)


def test_the_parameters_of_a_state_may_come_in_another_order(shared: RemoteOptions) -> None:
    """A state whose parameters were written and read by name, as by safetensors, is that of the same round."""
    worker = Worker(diloco, shared)
    with worker.rounds as rounds:
        worker.train(EVERY + 2)
        state = rounds.state_dict()
    state["parameters"] = dict(reversed(state["parameters"].items()))
    later = Worker(diloco, shared, worker.number, seed=9)
    later.rounds.load_state_dict(state)
    worker.rounds.close()
    with later.rounds as rounds:
        assert (rounds.local_step, rounds.version) == (2, 1)


def test_a_round_that_others_have_gone_beyond_is_given_up(shared: RemoteOptions) -> None:
    """Where the session has other parameters than the round began with, a resumed worker begins a round with those."""
    workers = [Worker(diloco, shared, number) for number in range(2)]
    with workers[0].rounds, workers[1].rounds:
        workers[0].train(2)
        workers[1].train(EVERY)
        later = resumed(workers[0], shared)
        with later.rounds as rounds:
            assert (rounds.local_step, rounds.version) == (0, 1)
            check_parameters(later.parameters, workers[1].parameters)


def test_a_state_that_does_not_fit(shared: RemoteOptions) -> None:
    """Another model's state is refused, and so is loading one into rounds that have joined their session."""
    worker = Worker(diloco, shared)
    with worker.rounds as rounds:
        state: dict[str, Any] = rounds.state_dict()
        with pytest.raises(FarstepError, match="joined already"):
            rounds.load_state_dict(state)
    other: Rounds = Worker(diloco, shared).rounds
    state["parameters"]["p0"] = state["parameters"]["p0"].double()
    with pytest.raises(ValueError, match="other names, shapes or dtypes"):
        other.load_state_dict(state)
