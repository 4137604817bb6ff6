"""Scalers that are informed of the steps of their session have one scale, as one worker with all gradients has."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler

from farstep.conversation import Conversation
from farstep.errors import NonFinite
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.twins import check_parameters, drawn, parameters
from tests.support.client.workers import Reference, synced, together
from tests.support.integrations.scaled import SCALE, Scaled, overflowing, scaler_


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
