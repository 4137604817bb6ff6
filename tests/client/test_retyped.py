"""Parameters of other dtypes and shapes than they had, or of kinds that nothing steps on: looking changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_parameters, check_states, drawn
from tests.support.service.servers import RunningServer

SHAPES = ((6, 4), (5, 3), (4, 2))
STATEFUL = [name for name in NAMES if name not in ("SGD", "LBFGS")]


def retyped(dtype: torch.dtype) -> Callable[[Tensor], None]:
    def away(p: Tensor) -> None:
        p.data = p.data.to(dtype)

    return away


def emptied(p: Tensor) -> None:
    p.data = torch.empty(0)


def flattened(p: Tensor) -> None:
    p.data = p.data.clone().reshape(-1)


AWAY = [retyped(torch.float16), retyped(torch.float64), emptied, flattened]
IDS = ["half", "double", "empty", "flat"]


def look(optimizer: Any) -> dict[str, Any]:
    """Look at all that can be looked at."""
    repr(optimizer)
    list(optimizer.state.items())
    optimizer.zero_grad()
    for view in optimizer.views:
        optimizer.pull_view(view)
    kept: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    return kept


def send_away(twins: Twins, away: Callable[[Tensor], None]) -> list[Tensor]:
    kept = [p.data for p in twins.here]
    for p in (*twins.here, *twins.there):
        p.grad = None
        away(p)
    return kept


@pytest.mark.parametrize("away", AWAY, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_look_while_they_are_away(name: str, away: Callable[[Tensor], None], place: RemoteOptions) -> None:
    """Away, looked at, and back: state has its bits and dtypes all the while, no session begins, training goes on."""
    twins = Twins(name, {}, place, start=drawn(0, SHAPES))
    for seed in (1, 2):
        twins.give(twins.drawn(seed))
        twins.ours.step(lambda: 1.0)
        twins.theirs.step(lambda: 1.0)
    session, before = twins.ours.session, copy.deepcopy(twins.theirs.state_dict())
    kept, theirs = [p.data for p in twins.here], [p.data for p in twins.there]
    send_away(twins, away)
    for _ in range(2):
        check_states(look(twins.ours), before)
    for ps, values in ((twins.here, kept), (twins.there, theirs)):
        for p, value in zip(ps, values, strict=True):
            p.data = value
    check_states(look(twins.ours), before)
    twins.give(twins.drawn(3))
    twins.ours.step(lambda: 1.0)
    twins.theirs.step(lambda: 1.0)
    twins.check()
    assert (twins.ours.session, twins.ours.version) == (session, twins.ours.version)
    twins.ours.close()


def test_an_average_is_not_touched_by_a_look(place: RemoteOptions) -> None:
    """The EMA view is the same before, while the model is half, and after."""
    twins = Twins("Adam", {}, {**place, "ema": 0.9}, start=drawn(0, SHAPES))
    twins.train(3)
    average = twins.ours.pull_view("ema")
    send_away(twins, retyped(torch.float16))
    assert all(map(torch.equal, twins.ours.pull_view("ema"), average))
    send_away(twins, retyped(torch.float32))
    assert all(map(torch.equal, twins.ours.pull_view("ema"), average))
    twins.train(2, first=4)
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_step_with_state_of_another_dtype_is_refused(name: str, named: bool, server: RunningServer) -> None:
    """Torch fails on it or computes in both dtypes; here the error says which is which, and nothing has changed."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference"}
    if named:
        place["session"] = f"retyped-{name}"
    twins = Twins(name, {}, place, start=drawn(0, SHAPES))
    twins.train(2)
    kept = [p.data for p in twins.here]
    before = copy.deepcopy(twins.ours.state_dict())
    for p in twins.here:
        p.grad = None
        p.data = p.data.half()
        p.grad = torch.ones_like(p)
        p.grad = p.grad.to_sparse() if name == "SparseAdam" else p.grad
    with pytest.raises(Exception, match=r"keeps the parameters|is torch\.float32.*torch\.float16"):
        twins.ours.step()
    check_states(twins.ours.state_dict(), before)
    for p, value in zip(twins.here, kept, strict=True):
        p.grad = None
        p.data = value
    twins.train(2, first=3)
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("name", [name for name in STATEFUL if name not in ("Muon", "SparseAdam", "ASGD", "NAdam")])
def test_a_state_that_is_loaded_again_follows(name: str, place: RemoteOptions) -> None:
    """`load_state_dict(state_dict())` casts state to the new dtype, as in torch, and the next step goes on in it."""
    twins = Twins(name, {}, place, start=drawn(0, SHAPES))
    twins.train(2)
    send_away(twins, retyped(torch.float64))
    for optimizer in (twins.ours, twins.theirs):
        optimizer.load_state_dict(optimizer.state_dict())
    check_states(twins.ours.state_dict(), twins.theirs.state_dict())
    twins.train(2, first=3)
    twins.check()
    twins.ours.close()


def test_without_state_a_step_goes_on_in_the_new_dtype(place: RemoteOptions) -> None:
    """Plain gradient descent has nothing in the old one: torch's bits."""
    twins = Twins("SGD", {"lr": 0.1}, place, start=drawn(0, SHAPES))
    twins.train(2)
    send_away(twins, retyped(torch.float64))
    twins.train(2, first=3)
    twins.check()
    twins.ours.close()


LEFT_OUT: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: torch.arange(4, dtype=torch.uint8),
    "int8": lambda: torch.arange(4, dtype=torch.int8),
    "int64": lambda: torch.arange(4),
    "bool": lambda: torch.tensor([True, False]),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8),
    "meta": lambda: torch.ones(4, device="meta"),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(4),
}


@pytest.mark.filterwarnings("ignore:quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_of_any_kind(kind: str, name: str, place: RemoteOptions) -> None:
    """What torch takes and never steps on, for want of a gradient, is taken, and has torch's state (none, mostly)."""
    if kind == "sparse" and name in ("Adagrad", "SparseAdam"):
        pytest.skip("torch's own constructor fails")
    frozen = LEFT_OUT[kind]()
    if name in ("Muon", "Adafactor"):
        frozen = frozen if name == "Adafactor" or frozen.dim() == 2 else frozen.reshape(2, -1)

    def grouped(ps: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": [ps[0], frozen, ps[1]]}, {"params": [ps[2]]}]

    twins = Twins(name, {}, place, start=drawn(0, SHAPES), grouping=grouped) if name != "LBFGS" else None
    if twins is None:
        twins = Twins(name, {}, place, start=drawn(0, SHAPES), grouping=lambda ps: [{"params": [*ps, frozen]}])
    for seed in (1, 2):
        twins.give(twins.drawn(seed))
        twins.ours.step(lambda: 1.0)
        twins.theirs.step(lambda: 1.0)
    check_parameters(twins.here, twins.there)
    ours, theirs = twins.ours.state_dict(), twins.theirs.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    assert ours["param_groups"] == theirs["param_groups"]
    twins.ours.load_state_dict(theirs)
    twins.ours.close()


def test_a_gradient_of_one_that_is_left_out_is_refused(place: RemoteOptions) -> None:
    """Integers may have a gradient, which torch fails to step along; so it is here, in torch's words."""
    twins = Twins("SGD", {}, place, start=drawn(0, SHAPES))
    whole = torch.ones(3, dtype=torch.int8)
    twins.ours.add_param_group({"params": [whole]})
    twins.give(twins.drawn(1))
    whole.grad = torch.ones(3, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="integral") as caught:
        twins.ours.step()
    assert isinstance(caught.value.__cause__, TensorMismatch)
    whole.grad = None
    twins.step(twins.drawn(2))
    check_parameters(twins.here, twins.there)
    twins.ours.close()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("Adagrad", "Muon", "SparseAdam", "LBFGS")])
def test_lazy_parameters(name: str, place: RemoteOptions) -> None:
    """A lazy layer's parameters join when they have a shape, with the state of the others as it is."""
    models: list[torch.nn.Sequential] = []
    optimizers: list[Any] = []
    for mine in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LazyLinear(2))
        models.append(model)
        twin = Twins(name, {}, place, start=drawn(0, SHAPES))
        twin.ours.close()
        options: dict[str, Any] = {"foreach": False} if "foreach" in twin.theirs.defaults else {}
        kind: Any = type(twin.ours if mine else twin.theirs)
        optimizers.append(kind(model.parameters(), **options, **(place if mine else {})))
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(1)
            model(torch.ones(5, 3)).pow(2).sum().backward()
            optimizer.step()
    check_parameters(list(models[0].parameters()), list(models[1].parameters()))
    check_states(optimizers[0].state_dict(), optimizers[1].state_dict())
    optimizers[0].close()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LBFGS"])
def test_a_group_without_parameters(name: str, place: RemoteOptions) -> None:
    """An optimizer may begin with an empty group, step, and be given parameters later."""
    twins = Twins(name, {}, place, start=drawn(0, SHAPES), grouping=lambda ps: [{"params": []}])
    twins.ours.step()
    twins.theirs.step()
    for optimizer, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        optimizer.add_param_group({"params": ps})
    for seed in (1, 2):
        twins.step(twins.drawn(seed))
    twins.check()
    twins.ours.close()
