"""Rounds as a context: what is counted, what is shown in a round, and how one is entered and left."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.amp import GradScaler

import farstep
from farstep.conversation import Conversation
from farstep.errors import FarstepError
from farstep.settings import RemoteOptions
from tests.support.client.rounds import EVERY, Simulation, Worker, diloco, model_of
from tests.support.client.twins import check_equal, check_parameters


def test_steps_are_counted_inside_only(shared: RemoteOptions) -> None:
    """Outside of the context the inner optimizer is an ordinary one; entering again goes on with the round."""
    worker, reference = Worker(diloco, shared), Simulation(diloco, 1)
    with worker.rounds:
        worker.train(2)
    assert worker.rounds.local_step == 2
    worker.train(2)
    assert (worker.rounds.local_step, worker.rounds.version) == (2, 0)
    with worker.rounds:
        worker.train(1)
    reference.every = 5
    reference.round()
    check_parameters(worker.parameters, reference.models[0])
    assert (worker.rounds.local_step, worker.rounds.version) == (0, 1)


def test_an_exception_keeps_the_round(shared: RemoteOptions) -> None:
    """A training that fails in the middle of a round has its count, and can go on from there."""
    worker, reference = Worker(diloco, shared), Simulation(diloco, 1)

    def fail() -> None:
        with worker.rounds:
            worker.train(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with worker.rounds:
        worker.train(1)
    reference.round()
    check_parameters(worker.parameters, reference.models[0])


def test_leaving_in_the_middle_keeps_local_steps_and_sync_ends_the_round(shared: RemoteOptions) -> None:
    """A round that is not complete is not sent by leaving; `sync()` sends it however few steps it has."""
    worker, reference = Worker(diloco, shared), Simulation(diloco, 1, every=2)
    with worker.rounds as rounds:
        worker.train(2)
    reference.local(0, 2)
    check_parameters(worker.parameters, reference.models[0])
    assert rounds.version == 0
    report = rounds.sync()
    reference.step([reference.delta(0, reference.bases)])
    reference.take(0)
    assert (report.version, rounds.local_step) == (1, 0)
    check_parameters(worker.parameters, reference.models[0])


def test_entering_twice_is_refused(shared: RemoteOptions) -> None:
    """One context cannot be entered within itself, which would count each step twice."""
    worker = Worker(diloco, shared)
    with worker.rounds, pytest.raises(FarstepError, match="entered already"):
        worker.rounds.__enter__()
    with worker.rounds:
        worker.train(1)
    assert worker.rounds.local_step == 1


def test_entering_after_closing_is_refused(shared: RemoteOptions) -> None:
    """A round that could never be sent does not begin."""
    worker = Worker(diloco, shared)
    with worker.rounds:
        worker.rounds.close()
    with pytest.raises(FarstepError, match="was closed"):
        worker.rounds.__enter__()


def in_the_third_round(shared: RemoteOptions) -> tuple[Worker, Simulation]:
    """Return a worker whose session has an average, one local step into its third round, and the same in torch."""
    worker, reference = Worker(diloco, {**shared, "ema": 0.5}), Simulation(diloco, 1)
    worker.rounds.__enter__()
    worker.train(2 * EVERY + 1)
    for _ in range(2):
        reference.round()
    reference.local(0, 1)
    return worker, reference


def finish(worker: Worker, reference: Simulation) -> None:
    """End the third round in both, and compare."""
    worker.train(EVERY - 1)
    reference.local(0, EVERY - 1)
    reference.step([reference.delta(0, reference.bases)])
    reference.take(0)
    check_parameters(worker.parameters, reference.models[0])
    assert (worker.rounds.version, worker.rounds.local_step) == (3, 0)


def test_an_average_takes_the_models_place_in_the_middle_of_a_round(shared: RemoteOptions) -> None:
    """Inside the model has the session's average, afterwards the steps of its round, which goes on as before."""
    worker, reference = in_the_third_round(shared)
    with worker.rounds.swap_to("ema"):
        check_equal(worker.values, worker.rounds.outer.pull_view("ema"))
    check_parameters(worker.parameters, reference.models[0])
    finish(worker, reference)


def test_a_view_is_not_taken_for_the_parameters_that_a_round_began_with(shared: RemoteOptions) -> None:
    """While the model, or the outer optimizer's copies, show an average, nothing is sent or saved."""
    worker, reference = in_the_third_round(shared)
    rounds = worker.rounds
    for shown in (rounds.outer.swap_to("ema"), rounds.swap_to("ema")):
        with shown:
            for asked in (rounds.sync, rounds.state_dict, rounds.pull, rounds.rejoin):
                with pytest.raises(FarstepError, match="inside swap_to"):
                    asked()
    finish(worker, reference)


def test_a_local_step_on_an_average_is_not_counted(shared: RemoteOptions) -> None:
    """It is refused, and what it did to the model goes with the average; the inner optimizer's state is its own."""
    worker, reference = in_the_third_round(shared)
    before = copy.deepcopy(worker.inner.state_dict())
    with worker.rounds.swap_to("ema"), pytest.raises(FarstepError, match="A step inside swap_to"):
        worker.train(1)
    worker.inner.load_state_dict(before)
    worker.taken -= 1
    finish(worker, reference)


def test_before_the_first_entering_there_is_no_session() -> None:
    """What needs the session says so."""
    rounds = Worker(diloco, {}).rounds
    for asked in (rounds.sync, rounds.pull, rounds.state_dict, lambda: rounds.version):
        with pytest.raises(FarstepError, match="no session as yet"):
            asked()
    rounds.close()


def test_the_session_is_left_with_the_context_object(shared: RemoteOptions, talk: Conversation) -> None:
    """A context without a name leaves the session at its end; `close()` does so at once, and may be called again."""
    model = model_of()
    inner = torch.optim.SGD(model.parameters())

    def workers() -> list[str]:
        return list(talk.control("GET", f"/v1/sessions/{shared['session']}")["workers"])

    named: RemoteOptions = {**shared, "worker": "w0"}
    with farstep.DiLoCo(model, inner, every=2, **named):
        assert workers() == ["w0"]
    gc.collect()
    assert workers() == []
    rounds = farstep.DiLoCo(model, inner, every=2, **named)
    with rounds:
        assert workers() == ["w0"]
        rounds.close()
        rounds.close()
        assert workers() == []
    with pytest.raises(FarstepError, match="closed"):
        rounds.sync()


def test_a_late_worker_takes_the_global_parameters(shared: RemoteOptions) -> None:
    """A worker that joins later begins with the session's parameters in its model, whatever it had."""
    early = Worker(diloco, shared, 0)
    with early.rounds:
        early.train(2 * EVERY)
        late = Worker(diloco, shared, 1, seed=3)
        with late.rounds:
            check_parameters(late.parameters, early.parameters)
            assert late.rounds.version == 2
            early.train(2)
            assert late.rounds.pull() == 2
            check_equal(late.values, [base.detach() for base in late.rounds.outer.param_groups[0]["params"]])


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_counted(shared: RemoteOptions, fused: bool) -> None:
    """A local step whose gradients overflowed is none, also where the optimizer is called to skip it."""
    model = model_of()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = GradScaler(device="cpu", init_scale=4.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with farstep.LocalSGD(model, inner, 3, **shared) as rounds:
        for bad in (False, True, False):
            scaler.scale(torch.ones(()))
            for p in parameters:
                p.grad = torch.full_like(p, torch.inf if bad else 4.0)
            scaler.step(inner)
            scaler.update()
        assert (rounds.local_step, rounds.version) == (2, 0)
