"""What callers find on an optimizer beside steps, compared with torch's: names, text, types, options, versions."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.errors import InvalidOption
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.copies import WAYS, Copy
from tests.support.client.options import NAMES
from tests.support.client.twins import (
    Twins,
    check_equal,
    check_parameters,
    check_states,
    drawn,
    ours,
    parameters,
    plain,
    start_of,
    theirs,
)
from tests.support.service.servers import RunningServer


@pytest.mark.promise(
    "The public methods, attributes and hooks of a torch optimizer are there and behave as torch's.",
    area="bits of torch",
)
@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_of_torchs_is_there(name: str) -> None:
    """Methods of torch's class are methods of ours, with its arguments."""
    own, torchs = getattr(farstep.optim, name), getattr(torch.optim, name)
    for each in dir(torchs):
        if each.startswith("_"):
            continue
        assert hasattr(own, each), each
        here, there = getattr(own, each), getattr(torchs, each)
        if inspect.isfunction(there):
            names = [list(inspect.signature(one).parameters) for one in (here, there)]
            assert names[0] == names[1]


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_torchs(name: str, place: RemoteOptions) -> None:
    """`defaults`, `param_groups` and the kind of `state` are torch's, in content, order and type."""
    twins = Twins(name, {}, place)
    assert twins.ours.defaults == twins.theirs.defaults
    assert list(twins.ours.defaults) == list(twins.theirs.defaults)
    (here,), (there,) = twins.ours.param_groups, twins.theirs.param_groups
    assert list(here) == list(there)
    assert type(here["params"]) is type(there["params"])
    assert isinstance(twins.ours.state, type(twins.theirs.state))
    assert repr(twins.ours) == repr(twins.theirs)
    assert isinstance(twins.ours, torch.optim.Optimizer)


# -- names ---------------------------------------------------------------------------------------------------------


def named(tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"layer{index}.weight", p) for index, p in enumerate(tensors)]


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_named_parameters_keep_their_names(name: str, groups: bool, place: RemoteOptions) -> None:
    """Given with names, in one list or in groups: they are in groups and state_dicts, and survive loads both ways."""
    twins = Twins(name, {}, place)
    here, there = parameters(start_of(name)), parameters(start_of(name))
    given: list[Any] = [named(here), named(there)]
    if groups:
        given = [[{"params": each[:2]}, {"params": each[2:], "lr": 0.5}] for each in given]
    twins.ours = ours(name)(given[0], **plain(name, {}), **place)
    twins.theirs = theirs(name)(given[1], **plain(name, {}))
    twins.here, twins.there = here, there
    twins.train(2)
    twins.check()
    assert repr(twins.ours) == repr(twins.theirs)
    kept = [copy.deepcopy(each.state_dict()) for each in (twins.ours, twins.theirs)]
    assert kept[0]["param_groups"][0]["param_names"][:2] == ["layer0.weight", "layer1.weight"]
    twins.ours.load_state_dict(kept[1])
    twins.theirs.load_state_dict(kept[0])
    for state in kept:  # without names, and with others
        for index, group in enumerate(state["param_groups"]):
            group["param_names"] = [f"other{index}.{i}" for i in range(len(group["params"]))]
    twins.ours.load_state_dict(kept[1])
    twins.theirs.load_state_dict(kept[0])
    twins.check()
    for state in kept:
        for group in state["param_groups"]:
            del group["param_names"]
    twins.ours.load_state_dict(kept[1])
    twins.theirs.load_state_dict(kept[0])
    twins.train(1, first=3)
    twins.check()


@WAYS
def test_copies_have_the_names(copied: Copy, place: RemoteOptions) -> None:
    """A copy by deepcopy or pickle has the names of the original."""
    optimizer = Adagrad(named(parameters(drawn(0))), **place)
    assert copied(optimizer).param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


def test_a_named_group_is_added_to_named_groups(place: RemoteOptions) -> None:
    """add_param_group takes names where the others have them."""
    twins = Twins("Adamax", {}, place)
    for side in ("here", "there"):
        ps = getattr(twins, side)
        rest = parameters(drawn(7, [(3, 2)]))
        kind: Any = type(twins.ours) if side == "here" else type(twins.theirs)
        options: Any = place if side == "here" else {}
        optimizer = kind(named(ps), foreach=False, **options)
        optimizer.add_param_group({"params": [("late", rest[0])], "lr": 0.5})
        ps += rest
        setattr(twins, "ours" if side == "here" else "theirs", optimizer)
    twins.train(2)
    twins.check()


def test_module_parameters_that_are_tied_are_one(place: RemoteOptions) -> None:
    """A tensor that a module has under two names is one parameter, and steps once along the whole gradient."""
    models = []
    for kind, options in ((farstep.optim.Adagrad, place), (torch.optim.Adagrad, {"foreach": False})):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
        model[2].weight = model[0].weight
        optimizer: Any = kind(model.parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).pow(2).sum().backward()
            optimizer.step()
        models.append(list(model.parameters()))
    assert len(models[0]) == 3
    check_parameters(*models)


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_edited_freely(name: str, place: RemoteOptions) -> None:
    """Rates of any kind torch takes, keys nobody knows, keys taken away and put back: as in torch, step by step."""
    twins = Twins(name, {}, place)
    rates: list[Any] = [0.1, 1, 0, torch.tensor(0.05), torch.tensor(0.25, dtype=torch.float64), 1e-8]
    for seed, rate in enumerate(rates):
        for optimizer in (twins.ours, twins.theirs):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.param_groups[0]["of_mine"] = {"seen": [seed]}
        twins.train(1, first=seed)
        # These compute with a tensor rate in the tensor's precision.
        twins.check(exact=name not in ("ASGD", "Adafactor", "Muon"))
    assert twins.ours.state_dict()["param_groups"][0]["of_mine"] == {"seen": [len(rates) - 1]}


@pytest.mark.parametrize("name", NAMES)
def test_a_group_may_be_another_object(name: str, place: RemoteOptions) -> None:
    """The dict of a group, or the list of groups, is exchanged for an equal one with other options."""
    twins = Twins(name, {}, place)
    twins.train(1)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}
    twins.train(1, first=2)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups = [{**group, "lr": 0.05} for group in optimizer.param_groups]
    twins.train(1, first=3)
    twins.check()


def test_a_tensor_rate_is_filled_by_schedulers(place: RemoteOptions) -> None:
    """A scheduler fills a tensor rate in place; the next step takes its value, and the tensor stays the caller's."""
    twins = Twins("Adagrad", {"lr": torch.tensor(0.1)}, place)
    rates = []
    for optimizer in (twins.ours, twins.theirs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] = rates[-1] = rates[-1].clone()
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (twins.ours, twins.theirs)]
    for seed in range(3):
        twins.train(1, first=seed)
        for schedule in schedules:
            schedule.step()
    assert twins.ours.param_groups[0]["lr"] is rates[0]
    check_equal([rates[0]], [rates[1]])
    twins.check()


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_gradients_stay_the_same_objects(name: str, place: RemoteOptions) -> None:
    """Storage, strides and the gradient with its bits stay; only parameters with a gradient have a new version."""
    twins = Twins(name, {}, place, start=drawn(0, [(4, 3), (5, 1), (2, 1)]))
    twins.here[0].data = twins.here[0].data.t().contiguous().t()
    gradients: list[Tensor | None] = [*twins.drawn(1)[:2], None]
    twins.step(gradients)
    before = [(p.data_ptr(), p.stride(), p._version, p.grad) for p in twins.here]
    twins.ours.step()
    for p, gradient, (address, strides, version, held) in zip(twins.here, gradients, before, strict=True):
        assert (p.data_ptr(), p.stride()) == (address, strides)
        assert p.grad is held
        if gradient is None or held is None:
            assert p._version == version
        else:
            assert p._version > version
            assert torch.equal(held.to_dense(), gradient.to_dense())


@pytest.mark.parametrize("name", NAMES)
def test_a_stale_backward_is_refused(name: str, place: RemoteOptions) -> None:
    """A graph that holds parameters from before a step raises torch's error."""
    twins = Twins(name, {}, place, start=drawn(0, [(4, 3)]))
    twins.train(1)
    stale = twins.here[0].pow(3).sum()
    twins.train(1, first=2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(stale)


def test_memory_is_shared_where_the_session_is(place: RemoteOptions) -> None:
    """Adagrad.share_memory cannot put a private session into other processes, and says what does."""
    optimizer = Adagrad(parameters(drawn(0)), **place)
    with pytest.raises(InvalidOption, match=r"server=.*session="):
        optimizer.share_memory()


def test_workers_of_a_session_share_its_state_already(server: RunningServer) -> None:
    """After share_memory, as before it, a second worker's step counts for the first one's state."""
    place: RemoteOptions = {"kernel": "reference", "server": server.url, "session": "shares-memory"}
    twins = Twins("Adagrad", {"lr": 0.1}, {**place, "worker": "w0"})
    other = Twins("Adagrad", {"lr": 0.1}, {**place, "worker": "w1"})
    assert isinstance(twins.ours, Adagrad)
    twins.ours.share_memory()
    for p, q, g in zip(other.here, twins.there, drawn(1), strict=True):
        p.grad, q.grad = g, g.clone()
    other.ours.step()
    twins.theirs.step()
    check_states(twins.ours.state_dict(), twins.theirs.state_dict())
