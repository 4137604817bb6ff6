"""`torch.amp.GradScaler`: steps that it skips are skipped here, alone and in a sync session, where nobody waits.

Alone, GradScaler simply does not call `step()`. In a sync session it does, so that the others learn of the skip; torch
on the mean of the gradients, which leaves out the steps that somebody skipped, is the oracle.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption
from farstep.optim import Adagrad, RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.carrying import Counting
from tests.support.client.twins import check_parameters, check_states, drawn, parameters
from tests.support.client.workers import Reference, Worker, synced, together
from tests.support.faults import faulty
from tests.support.integrations.scaled import BAD, SCALE, Scaled, overflowing, scaler_
from tests.support.integrations.training import Make, batches, loss_of, model, ours, same, theirs
from tests.support.service.servers import RunningServer

# -- alone -----------------------------------------------------------------------------------------------------------


class Training:
    """A training with a scaler, one step of which overflows.

    Args:
        make: makes the optimizer.
        clip: whether gradients are unscaled by the caller, and clipped.
    """

    def __init__(self, make: Make, *, clip: bool) -> None:
        self.model, self.scaler, self._clip = model(), scaler_(), clip
        self.optimizer = make(self.model.parameters())
        self.scales: list[float] = []

    def step(self, number: int, inputs: Tensor, classes: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, inputs, classes)
        torch.autograd.backward(self.scaler.scale(loss * float("inf") if number == BAD else loss))
        if self._clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())

    def run(self) -> Training:
        for number, (inputs, classes) in enumerate(batches()):
            self.step(number, inputs, classes)
        return self


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_scaled_training_has_torchs_bits(name: str, clip: bool, place: RemoteOptions) -> None:
    """Parameters, gradients, state and scales are torch's, with a step that was skipped in between."""
    here = Training(ours(name, place, lr=0.1), clip=clip).run()
    there = Training(theirs(name, lr=0.1), clip=clip).run()
    same(here.model, there.model)
    assert here.scales == there.scales
    assert here.scales[BAD] == here.scales[BAD - 1] / 2
    check_states(here.optimizer.state_dict(), there.optimizer.state_dict())
    for one, other in zip(here.model.parameters(), there.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    assert isinstance(here.optimizer, RemoteOptimizer)
    assert here.optimizer.version == len(batches()) - 1


def test_a_skipped_step_sends_nothing(server: RunningServer) -> None:
    """Alone in a session the optimizer does not hear of it, and no byte moves."""
    transport = Counting()
    training = Training(ours("SGD", {"server": server.url, "transport": transport}, lr=0.1), clip=False)
    inputs, classes = next(iter(batches()))
    training.step(0, inputs, classes)
    assert transport.during(lambda: training.step(BAD, inputs, classes)) == 0
    assert transport.during(lambda: training.step(1, inputs, classes)) > 0


# -- together --------------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "A step that `GradScaler` skips on one worker is skipped for all, at once.",
    area="consistency modes",
)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_step_that_one_skips_is_skipped_by_both(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation, order: tuple[int, int], clip: bool
) -> None:
    """Nobody waits, both learn that nothing was applied, and the training goes on, bit for bit as torch's would.

    Each worker has its own scale, and only the one whose gradients overflowed lowers it, unless scalers are informed.
    """
    place = synced(shared, 2)
    workers = [Scaled(place, "w0", clip=clip), Scaled(place, "w1", scale=4 * SCALE, clip=clip)]
    reference = Reference()
    for number in range(6):
        gradients = [drawn(10 * number + index) for index in range(2)]
        bad = {BAD: 0, BAD + 1: 1}.get(number)
        if bad is not None:
            gradients[bad] = overflowing(10 * number)
        before = [worker.scaler.get_scale() for worker in workers]
        together(threads, talk, [(workers[index], gradients[index]) for index in order])
        if bad is None:
            reference.step(*gradients)
        for index, worker in enumerate(workers):
            assert worker.applied == (bad is None)
            check_parameters(worker.parameters, reference.parameters)
            assert (worker.scaler.get_scale() < before[index]) == (bad == index)
            if index != bad:
                check_parameters(worker.gradients, gradients[index])
    assert workers[0].optimizer.version == 4
    check_states(workers[0].optimizer.state_dict(), reference.optimizer.state_dict())


def test_the_last_step_of_a_training_may_be_a_skipped_one(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """The other one's last push is answered long before the deadline, although the first one never steps again."""
    place = synced(shared, 2, deadline_s=3600.0)
    workers = [Scaled(place, "w0"), Scaled(place, "w1")]
    together(threads, talk, [(workers[1], drawn(1)), (workers[0], overflowing(2))])
    assert [worker.applied for worker in workers] == [False, False]
    assert [worker.optimizer.version for worker in workers] == [0, 0]


def test_a_skip_and_an_option_in_the_same_step(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """A learning rate that a scheduler changed just then is in force in the next step."""
    place = synced(shared, 2)
    workers = [Scaled(place, "w0"), Scaled(place, "w1")]
    reference = Reference()
    for each in (*(worker.optimizer for worker in workers), reference.optimizer):
        each.param_groups[0]["lr"] = 0.01
    together(threads, talk, [(workers[0], overflowing(1)), (workers[1], drawn(2))])
    together(threads, talk, [(workers[0], drawn(3)), (workers[1], drawn(4))])
    reference.step(drawn(3), drawn(4))
    check_parameters(workers[0].parameters, reference.parameters)


def test_a_skip_whose_answer_is_lost_is_told_once(
    server: RunningServer, shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """The skip is repeated under its name and gets its first receipt; the next step is not skipped for it."""
    place = synced(shared, 2)
    reference = Reference()
    with faulty(server.port) as network:
        workers = [Scaled({**place, "server": network.url}, "w0"), Scaled(place, "w1")]
        network.cut_response(after=0)
        together(threads, talk, [(workers[1], drawn(1)), (workers[0], overflowing(2))])
        report = workers[0].optimizer.last_step
        assert report is not None
        assert (report.applied, report.duplicate) == (False, True)
        together(threads, talk, [(workers[0], drawn(3)), (workers[1], drawn(4))])
        reference.step(drawn(3), drawn(4))
        check_parameters(workers[0].parameters, reference.parameters)
        workers[0].optimizer.close()


def test_a_scaled_step_that_failed_can_be_tried_again(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """GradScaler finds the gradients and the optimizer as it left them, so nothing is unscaled twice."""
    place = synced(shared, 2)
    reference = Reference()
    workers = [Scaled(place, "w0"), Scaled(place, "w1")]
    (group,) = workers[0].optimizer.param_groups
    group["lr"] = "much"
    with pytest.raises(InvalidOption):
        workers[0].step(drawn(1))
    check_parameters(workers[0].gradients, [SCALE * g for g in drawn(1)])
    group["lr"] = 0.1
    pushes = [threads.submit(workers[0].try_), threads.submit(workers[1].step, drawn(2))]
    for push in pushes:
        push.result()
    reference.step(drawn(1), drawn(2))
    check_parameters(workers[0].parameters, reference.parameters)


def test_sparse_gradients_are_unscaled_too(shared: RemoteOptions, threads: ThreadPoolExecutor) -> None:
    """An embedding's sparse gradients arrive as torch's would."""
    place = synced(shared, 2)

    def embedding() -> nn.Embedding:
        torch.manual_seed(0)
        return nn.Embedding(10, 3, sparse=True)

    def work(network: nn.Embedding, optimizer: torch.optim.Optimizer) -> None:
        scaler = scaler_()
        for rows in ([1, 2, 1], [4, 2, 2]):
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale(network(torch.tensor(rows)).square().sum()))
            scaler.step(optimizer)
            scaler.update()

    reference, workers = embedding(), [embedding(), embedding()]
    work(reference, torch.optim.Adagrad(reference.parameters(), lr=0.1, foreach=False))
    places: list[RemoteOptions] = [{**place, "worker": "w0"}, {**place, "worker": "w1"}]
    optimizers = [Adagrad(each.parameters(), lr=0.1, **own) for each, own in zip(workers, places, strict=True)]
    runs = [threads.submit(work, *pair) for pair in zip(workers, optimizers, strict=True)]
    for run in runs:
        run.result()
    for each in workers:
        torch.testing.assert_close(each.weight, reference.weight)


# -- asked for -------------------------------------------------------------------------------------------------------


def test_who_asks_for_it_is_told_of_skipped_steps_in_any_session(place: RemoteOptions) -> None:
    """With torch's own attribute set, a skipped step is a step that was not applied, alone and embedded too."""
    (p,), (q,) = parameters(drawn(0, [(5,)])), parameters(drawn(0, [(5,)]))
    optimizer: Any = Adagrad([p], lr=0.1, **place)
    plain = torch.optim.Adagrad([q], lr=0.1, foreach=False)
    optimizer._step_supports_amp_scaling = True
    scalers = scaler_(), scaler_()
    for number in range(5):
        for each, own, scaler in ((p, optimizer, scalers[0]), (q, plain, scalers[1])):
            own.zero_grad()
            own.param_groups[0]["lr"] = 0.1 / (number + 1)
            loss = (each.square() * (float("inf") if number == BAD else 1.0)).sum()
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(own)
            scaler.update()
        check_parameters([p], [q])
        assert optimizer.last_step.applied == (number != BAD)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert optimizer.version == 4


def test_a_scaled_step_without_any_gradient(place: RemoteOptions) -> None:
    """There is nothing to unscale and nothing that could overflow; the step is taken and changes nothing."""
    (p,) = parameters(drawn(0, [(5,)]))
    optimizer: Any = Adagrad([p], lr=0.1, **place)
    optimizer._step_supports_amp_scaling = True
    scaler = scaler_()
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert optimizer.last_step.applied
    check_parameters([p], drawn(0, [(5,)]))


def test_only_who_keeps_others_waiting_handles_scaling(shared: RemoteOptions) -> None:
    """Lightning does not clip for an optimizer that does, so one that is alone, such as a copy, leaves it to torch."""
    worker = Worker(synced(shared, 2), "w0")
    assert worker.optimizer._step_supports_amp_scaling
    assert not copy.deepcopy(worker.optimizer)._step_supports_amp_scaling
    alone: RemoteOptions = {"consistency": farstep.Sync(workers=1)}
    assert not Adagrad(parameters(drawn(0)), **alone)._step_supports_amp_scaling
