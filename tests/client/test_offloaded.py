"""Parameters that are emptied, flattened or retyped for a while, without a gradient, while the others step."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_parameters, drawn, gradients_of
from tests.support.client.workers import Worker
from tests.support.service.servers import RunningServer

SHAPES = ((6, 4), (5, 3), (4, 2))


def emptied(p: Tensor) -> None:
    p.data = torch.empty(0)


def flattened(p: Tensor) -> None:
    p.data = p.data.clone().reshape(-1)


def halved(p: Tensor) -> None:
    p.data = p.data.half()


AWAY = [emptied, flattened, halved]


def step_without(twins: Twins, away: set[int], seed: int) -> None:
    gradients = gradients_of(twins.name, seed, drawn(0, SHAPES))
    twins.step([None if index in away else each for index, each in enumerate(gradients)])


def send(twins: Twins, index: int, away: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    kept = twins.here[index].data, twins.there[index].data
    for p in (twins.here[index], twins.there[index]):
        p.grad = None
        away(p)
    return kept


def bring(twins: Twins, index: int, kept: tuple[Tensor, Tensor]) -> None:
    twins.here[index].data, twins.there[index].data = kept


@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "LBFGS"])
def test_the_others_step_on(name: str, away: Callable[[Tensor], None], place: RemoteOptions) -> None:
    """Torch's bits, in the same session; what is away is not touched, whoever looks or pulls, and goes on when back."""
    twins = Twins(name, {}, place, start=drawn(0, SHAPES))
    twins.train(2)
    session = twins.ours.session
    first = send(twins, 0, away)
    before = twins.here[0].data.clone()
    step_without(twins, {0}, 3)
    twins.check()
    second = send(twins, 2, away)
    step_without(twins, {0, 2}, 4)
    twins.ours.pull()
    twins.check()
    assert torch.equal(twins.here[0].data, before)
    bring(twins, 0, first)
    step_without(twins, {2}, 5)
    bring(twins, 2, second)
    twins.train(2, first=6)
    twins.check()
    assert twins.ours.session == session
    twins.ours.close()


@pytest.mark.parametrize("wire", [None, "bf16"])
def test_what_comes_back_with_other_values_counts(wire: str | None, server: RunningServer) -> None:
    """Values that it is brought back with are the session's from then on, as any edit."""
    twins = Twins("SGD", {"lr": 0.5}, {"server": server.url, "wire": wire}, start=drawn(0, SHAPES))
    for name in (0, 1):
        send(twins, name, emptied)
    twins.step([None, None, torch.full((4, 2), 0.5)])
    for index, values in ((0, torch.full((6, 4), 2.0)), (1, torch.full((5, 3), 4.0))):
        bring(twins, index, (values, values.clone()))
    twins.step([torch.ones(6, 4), None, None])
    check_parameters(twins.here[:2], twins.there[:2])
    twins.ours.pull()
    check_parameters(twins.here[:2], twins.there[:2])
    twins.ours.close()


@pytest.mark.parametrize("edited", [False, True])
def test_what_others_made_of_it_meanwhile(edited: bool, shared: RemoteOptions) -> None:
    """In a shared session it comes back with the steps of others, unless it was changed here: that is an edit."""
    one, other = Worker(shared, "one"), Worker(shared, "other")
    ones = [torch.ones_like(p) for p in one.parameters]
    kept = one.parameters[0].data
    one.parameters[0].data = torch.empty(0)
    one.step([None, *ones[1:]])
    other.step(ones)
    one.step([None, *ones[1:]])
    assert one.parameters[0].numel() == 0
    one.parameters[0].data = kept * 2 if edited else kept
    wanted = (kept * 2 if edited else other.parameters[0].data).clone()
    one.step([None, *ones[1:]])
    other.optimizer.pull()
    for worker in (one, other):
        assert torch.equal(worker.parameters[0].data, wanted)
    for p, q in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(p, q)
    one.optimizer.close()
    other.optimizer.close()


def test_a_gradient_in_the_new_form_is_as_ever(place: RemoteOptions) -> None:
    """One that gets a gradient there is no longer away: without state it goes on in its new form, with torch's bits."""
    twins = Twins("SGD", {"lr": 0.1}, place, start=drawn(0, SHAPES))
    twins.train(1)
    for p in (twins.here[0], twins.there[0]):
        p.grad = None
        p.data = p.data.double()
    step_without(twins, {0}, 2)
    check_parameters(twins.here[1:], twins.there[1:])
    for p in (twins.here[0], twins.there[0]):
        p.grad = torch.ones_like(p)
    for p in (*twins.here[1:], *twins.there[1:]):
        p.grad = None
    twins.ours.step()
    twins.theirs.step()
    assert twins.here[0].dtype is torch.float64
    assert torch.equal(twins.here[0], twins.there[0])
    check_parameters(twins.here[1:], twins.there[1:])
    twins.ours.close()


@pytest.mark.parametrize("name", ["Adagrad", "SGD"])
def test_state_that_a_load_casts_to_the_dtype_of_the_moment_is_refused(name: str, place: RemoteOptions) -> None:
    """A load casts state to the dtype a parameter has then; a session with another dtype refuses it, and goes on."""
    twins = Twins(name, {"momentum": 0.9} if name == "SGD" else {}, place, start=drawn(0, SHAPES))
    twins.train(2)
    state = twins.ours.state_dict()
    kept = send(twins, 0, halved)
    twins.ours.load_state_dict(state)
    bring(twins, 0, kept)
    twins.give(gradients_of(name, 3, drawn(0, SHAPES)))
    before = [p.detach().clone() for p in twins.here]
    with pytest.raises(TensorMismatch, match=r"is torch\.float16, the parameter is torch\.float32"):
        twins.ours.step(lambda: 1.0)
    check_parameters(twins.here, before)
    twins.ours.load_state_dict(state)
    twins.train(2, first=3)
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("name", ["Adagrad", "SGD"])
def test_one_that_is_away_with_a_gradient_is_refused_by_name(name: str, place: RemoteOptions) -> None:
    """A gradient of before makes the step of an emptied parameter impossible, in torch too; copies say so as well."""
    twins = Twins(name, {"momentum": 0.9} if name == "SGD" else {}, place, start=drawn(0, SHAPES))
    twins.train(2)
    kept = twins.here[0].data, twins.there[0].data
    twins.give(gradients_of(name, 3, drawn(0, SHAPES)))
    twins.here[0].data = torch.empty(0)
    with pytest.raises(TensorMismatch, match=r"Parameter '0.0' is \(0,\) by now"):
        twins.ours.step(lambda: 1.0)
    twins.here[0].grad = None
    with pytest.raises(TensorMismatch, match="another shape by now"):
        deepcopy(twins.ours)
    twins.here[0].data = kept[0]
    twins.train(2, first=3)
    twins.check()
    twins.ours.close()
