"""`torch.amp.GradScaler`: steps that it skips are skipped here, alone and in a sync session, where nobody waits.

Alone, GradScaler simply does not call `step()`. In a sync session it does, so that the others learn of the skip; torch
on the mean of the gradients, which leaves out the steps that somebody skipped, is the oracle.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption, NonFinite
from farstep.optim import Adagrad, RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.client.carrying import Counting
from tests.client.twins import check_parameters, check_states, drawn, parameters
from tests.client.workers import Reference, Worker, synced, together
from tests.faults import faulty
from tests.integrations.training import Make, batches, loss_of, model, ours, same, theirs
from tests.service.servers import RunningServer

SCALE = 2.0**10
BAD = 3
"""The step whose gradients overflow."""


def scaler_(scale: float = SCALE) -> GradScaler:
    return GradScaler(device="cpu", init_scale=scale, growth_interval=3)


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


class Scaled(Worker):
    """A worker of a sync session with a scaler of its own."""

    def __init__(
        self, place: RemoteOptions, name: str, *, scale: float = SCALE, clip: bool = False, informed: bool = False
    ) -> None:
        super().__init__(place, name)
        self.scaler, self._clip = scaler_(scale), clip
        if informed:
            self.optimizer.inform(self.scaler)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Come by these gradients as a loss's, and step."""
        self.optimizer.zero_grad()
        terms: list[Tensor] = [(p * g).sum() for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        torch.autograd.backward(self.scaler.scale(torch.stack(terms).sum()))
        self.try_()

    def try_(self) -> None:
        if self._clip:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def applied(self) -> bool:
        report = self.optimizer.last_step
        assert report is not None
        return report.applied


def overflowing(seed: int) -> list[Tensor]:
    gradients = drawn(seed)
    gradients[0][0, 0] = float("inf")
    return gradients


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


# -- one scale for all -----------------------------------------------------------------------------------------------


class Alone:
    """torch's optimizer with a scaler, on the mean of the workers' gradients: one overflows if one of theirs does."""

    def __init__(self, scale: float = SCALE) -> None:
        self.reference, self.scaler = Reference(), scaler_(scale)

    def step(self, *gradients: Sequence[Tensor]) -> None:
        scale = self.scaler.scale(torch.ones(()))
        for p, each in zip(self.reference.parameters, zip(*gradients, strict=True), strict=True):
            p.grad = sum(each[1:], start=each[0]) / len(each) * scale
        self.scaler.step(self.reference.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_scalers_that_are_informed_have_one_scale(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation, count: int, clip: bool
) -> None:
    """Whoever overflows, and however often: every scale falls and grows as a single scaler's on the mean would."""
    place = synced(shared, count)
    workers = [Scaled(place, f"w{index}", clip=clip, informed=True) for index in range(count)]
    alone = Alone()
    bad = {2: [0], 3: [1], 8: list(range(count)), 13: [count - 1]}
    scales = []
    for number in range(18):
        gradients = [
            overflowing(10 * number) if index in bad.get(number, ()) else drawn(10 * number + index)
            for index in range(count)
        ]
        together(threads, talk, list(zip(workers, gradients, strict=True)))
        alone.step(*gradients)
        scales.append(alone.scaler.get_scale())
        for worker in workers:
            assert worker.applied == (number not in bad)
            assert worker.scaler.get_scale() == scales[-1]
            assert worker.scaler._get_growth_tracker() == alone.scaler._get_growth_tracker()
            check_parameters(worker.parameters, alone.reference.parameters)
    assert min(scales) not in (scales[0], scales[-1])


@pytest.mark.parametrize("policy", ["skip", "refuse"])
def test_an_overflow_of_the_sum_lowers_every_scale(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation, policy: str
) -> None:
    """No worker could find it: each gradient is finite. Where it is skipped all learn of it; else it is an error."""
    place: RemoteOptions = {**synced(shared, 2), "nonfinite": "skip" if policy == "skip" else "refuse"}
    workers = [Scaled(place, f"w{index}", scale=1.0, informed=True) for index in range(2)]
    before = [p.detach().clone() for p in workers[0].parameters]
    huge = drawn(1)
    huge[0][0, 0] = 3e38
    if policy == "refuse":
        with pytest.raises(NonFinite, match="sum"):
            together(threads, talk, [(worker, huge) for worker in workers])
        return
    together(threads, talk, [(worker, huge) for worker in workers])
    for worker in workers:
        report = worker.optimizer.last_step
        assert report is not None
        assert (report.applied, report.reason) == (False, "nonfinite")
        assert worker.scaler.get_scale() == 0.5
        check_parameters(worker.parameters, before)
    together(threads, talk, [(worker, drawn(2)) for worker in workers])
    assert [worker.applied for worker in workers] == [True, True]


def test_accumulated_rounds_that_overflow_on_one_worker_are_left_out(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """The round is skipped and every scale falls; the step is of as many good rounds as were asked for."""
    place: RemoteOptions = {**synced(shared, 2), "accumulate": 2}
    workers = [Scaled(place, f"w{index}", informed=True) for index in range(2)]
    reference = Reference()
    rounds = [[drawn(10), drawn(11)], [overflowing(20), drawn(21)], [drawn(30), drawn(31)]]
    for gradients, reason in zip(rounds, ["accumulated", "skipped", ""], strict=True):
        together(threads, talk, list(zip(workers, gradients, strict=True)))
        for worker in workers:
            assert worker.optimizer.last_step is not None
            assert worker.optimizer.last_step.reason == reason
    means = [[(one + other) / 2 for one, other in zip(*rounds[index], strict=True)] for index in (0, 2)]
    reference.step(*means)
    for worker in workers:
        check_parameters(worker.parameters, reference.parameters)
        assert worker.scaler.get_scale() == SCALE / 2


def test_another_optimizer_of_an_informed_scaler_takes_its_steps(place: RemoteOptions) -> None:
    """A sum that overflows in the session is its optimizer's alone, as what torch finds is; the scale is both's."""
    (p,), (q,) = parameters(drawn(0, [(5,)])), parameters([torch.zeros(3)])
    options: RemoteOptions = {**place, "nonfinite": "skip", "accumulate": 2}
    optimizer, other, scaler = Adagrad([p], lr=0.1, **options), torch.optim.SGD([q], lr=1.0), scaler_(1.0)
    optimizer.inform(scaler)
    for reason in ("accumulated", "nonfinite"):
        scaler.scale(torch.zeros(()))
        p.grad, q.grad = torch.full((5,), 3e38), torch.ones(3)
        scaler.unscale_(other)
        scaler.step(optimizer)
        scaler.step(other)
        scaler.update()
        assert optimizer.last_step is not None
        assert optimizer.last_step.reason == reason
    check_parameters([q], [torch.full((3,), -2.0)])
    assert scaler.get_scale() == 0.5


def test_a_scaler_that_is_switched_off_can_be_informed(place: RemoteOptions) -> None:
    """Scripts that leave the scaler in, disabled, run as they are."""
    (p,) = parameters(drawn(0, [(5,)]))
    options: RemoteOptions = {**place, "nonfinite": "skip"}
    optimizer = Adagrad([p], lr=0.1, **options)
    scaler = GradScaler(device="cpu", enabled=False)
    optimizer.inform(scaler)
    p.grad = torch.full((5,), float("nan"))
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.last_step is not None
    assert optimizer.last_step.reason == "nonfinite"


def test_a_scaler_stays_informed_when_parameters_are_exchanged(place: RemoteOptions) -> None:
    """The new private session that other parameters lead to tells the same scaler."""
    (p,) = parameters(drawn(0, [(5,)]))
    options: RemoteOptions = {**place, "nonfinite": "skip"}
    optimizer = Adagrad([p], lr=0.1, **options)
    scaler = scaler_()
    optimizer.inform(scaler)
    (q,) = parameters(drawn(1, [(3,)]))
    optimizer.param_groups[0]["params"] = [q]
    q.grad = torch.ones(3)
    optimizer.step()
    assert optimizer._membership.scaler is scaler


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
