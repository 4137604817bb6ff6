"""What a session does around a step, in modes in which a round is not simply one push of each worker."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.protocol.consistency import Async, Bounded, Sync
from tests.session.writers import equal, mean_of, parameters, receipt, started, values


def times(weight: float, gradients: list[Tensor]) -> list[Tensor]:
    return [weight * gradient for gradient in gradients]


def test_rounds_of_a_quorum_are_accumulated() -> None:
    """Who was left out of a round is not late before the step is taken: its gradient is its part of the next round."""
    session, (w0, w1, w2), twin = started(Sync(workers=3, quorum=2), accumulate=2)
    w0.push(values(session, 0))
    w1.push(values(session, 1))
    assert session.version == 0
    w2.push(values(session, 2))
    w0.last = session.position("w0")[1]
    name = w0.named()
    told = receipt(w0.push(values(session, 3)), name)
    assert (told.version, told.contributors) == (1, ("w0", "w1", "w0", "w2"))
    first = mean_of(values(session, 0), values(session, 1))
    second = mean_of(values(session, 3), values(session, 2))
    assert equal(parameters(session), twin.step(mean_of(first, second)))
    name = w1.named()
    assert receipt(w1.push(values(session, 4), base=0), name).reason == "late"


@pytest.mark.parametrize(("scaling", "weight"), [("inverse", 1 / 2), ("sqrt", 1 / math.sqrt(2))])
def test_a_stale_gradient_in_a_round_counts_less(scaling: Any, weight: float) -> None:
    """It is the gradient that is weighed, and not the learning rate of the whole step; its receipt says how much."""
    session, (w0, w1, _), twin = started(Async(staleness_scaling=scaling), accumulate=2, names=("w", "b"))
    for seed in (0, 1):
        w0.push(values(session, seed))
    twin.step(mean_of(values(session, 0), values(session, 1)))
    name = w1.named()
    assert receipt(w1.push(values(session, 2), base=0), name).weight == weight
    w0.push(values(session, 3))
    stale = times(weight, values(session, 2))
    assert equal(parameters(session), twin.step(mean_of(stale, values(session, 3))))


def test_a_compensated_gradient_that_overflows_is_no_step() -> None:
    """The gradient that came was finite; what compensation makes of it is looked at."""
    mode = Async(delay_compensation=1.0)
    session, (w0, w1, _), _ = started(mode, nonfinite="skip", names=("w", "b"))
    session.received("w1", w1.epoch, 0.0)
    w0.push(values(session, 0))
    before = parameters(session)
    name = w1.named()
    huge = [torch.full((3, 4), 1e30), torch.zeros(5)]
    told = receipt(w1.push(huge, base=0), name)
    assert (told.applied, told.reason) == (False, "nonfinite")
    assert equal(parameters(session), before)


def test_a_worker_whose_steps_are_skipped_keeps_nobody_waiting() -> None:
    """In a bounded session a step with NaN counts as one that its worker has completed."""
    session, (w0, w1), _ = started(Bounded(staleness=0), "w0", "w1", nonfinite="skip")
    for seed in range(3):
        name = w0.named()
        told = receipt(w0.push([gradient * math.nan for gradient in values(session, seed)]), name)
        assert told.reason == "nonfinite"
        name = w1.named()
        assert receipt(w1.push(values(session, seed)), name).applied
    assert session.version == 3


def test_rounds_survive_a_switch_of_the_mode() -> None:
    """What was accumulated in one mode is part of a step in the other."""
    session, (w0, w1, _), twin = started(Async(), accumulate=2)
    w0.push(values(session, 0))
    session.leave("w2", 1, 0.0)
    session.set_consistency(Sync(workers=2), 0.0)
    w0.push(values(session, 1))
    name = w1.named()
    told = receipt(w1.push(values(session, 2)), name)
    assert told.contributors == ("w0", "w0", "w1")
    later = mean_of(values(session, 1), values(session, 2))
    assert equal(parameters(session), twin.step(mean_of(values(session, 0), later)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_quorum_skips_a_step_with_nan(order: tuple[int, int]) -> None:
    """Those of the quorum learn whose it was; the third one's gradient is for the next step."""
    session, writers, twin = started(Sync(workers=3, quorum=2), nonfinite="skip")
    for index in order:
        gradients = values(session, index)
        if index:
            gradients[0][0, 0] = math.inf
        name = writers[index].named()
        outcomes = writers[index].push(gradients)
    assert len(outcomes) == 2
    told = receipt(outcomes, name)
    assert told.detail == "The gradient of 'w' from worker 'w1' holds NaN or Inf."
    for writer in writers[:2]:
        writer.last = session.position(writer.name)[1]
    writers[2].push(values(session, 2))
    name = writers[0].named()
    assert receipt(writers[0].push(values(session, 3)), name).applied
    assert equal(parameters(session), twin.step(mean_of(values(session, 3), values(session, 2))))
