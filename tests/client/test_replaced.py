"""Parameters that are replaced inside a group, as FSDP2 and Accelerate do: state is the parameter's, as in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.conversation import Conversation
from farstep.errors import FarstepError, UnknownSession
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES, three_groups
from tests.support.client.twins import FITTING, Twins, check_equal, check_parameters, check_states, drawn, parameters
from tests.support.service.servers import RunningServer

COUNT = itertools.count()
SHAPES = [(7, 5), (5,), (5,), (2, 3)]


@pytest.fixture(params=["embedded", "private", "named"])
def anywhere(request: pytest.FixtureRequest) -> RemoteOptions:
    """Name a place for a session: in this process, on the server alone, or on the server where others may join."""
    if request.param == "embedded":
        return {"kernel": "reference"}
    running: RunningServer = request.getfixturevalue("server")
    place: RemoteOptions = {"kernel": "reference", "server": running.url}
    if request.param == "named":
        place["session"] = f"replaced-{next(COUNT)}"
    return place


def replace(twins: Twins, index: int, *, state: bool = False, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Put other parameters in the place of one of both optimizers, and return the old ones."""
    value = drawn(50 + index, [twins.here[index].shape])[0] if value is None else value
    old = twins.here[index], twins.there[index]
    for optimizer, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        (new,) = parameters([value])
        each: Any = optimizer
        for group in each.param_groups:
            group["params"] = [new if p is ps[index] else p for p in group["params"]]
        if state:
            each.state[new] = each.state.pop(ps[index])
        ps[index] = new
    return old


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_state_begins_anew(name: str, anywhere: RemoteOptions) -> None:
    """The new one's value counts, its state begins with its first step; the old one's stays where it was."""
    start = drawn(0, FITTING.get(name, SHAPES))
    twins = Twins(name, {}, anywhere, start=start, grouping=three_groups)
    twins.train(2)
    session, kept = twins.ours.session, [p.detach().clone() for p in twins.here]
    old = replace(twins, 1)
    twins.train(3, first=3)
    check_parameters(twins.here, twins.there)
    assert twins.ours.session == session
    check_equal([old[0].detach()], [kept[1]])
    assert (old[0] in twins.ours.state) == (old[1] in twins.theirs.state)
    for optimizer, p in zip((twins.ours, twins.theirs), old, strict=True):
        if p in optimizer.state:
            with pytest.raises(KeyError):
                optimizer.state_dict()
        optimizer.state.pop(p, None)
    twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_state_that_was_moved_is_the_new_ones(name: str, anywhere: RemoteOptions) -> None:
    """`state[new] = state.pop(old)` carries state over, and training goes on with it."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    twins = Twins(name, options, anywhere, start=drawn(0, FITTING.get(name, SHAPES)))
    twins.train(2)
    replace(twins, 2, state=True)
    twins.check()
    replace(twins, 0, state=True, value=twins.here[0].detach().clone())
    twins.train(3, first=3)
    twins.check()


def test_a_whole_list_may_be_exchanged(anywhere: RemoteOptions) -> None:
    """All parameters of a group are others, before the first step and after."""
    twins = Twins("Adamax", {}, anywhere, start=drawn(0, SHAPES))
    for _ in range(2):
        for index in range(len(SHAPES)):
            replace(twins, index, state=bool(twins.ours.version))
        twins.train(2)
        twins.check()


def test_a_parameter_that_comes_back_finds_its_state(anywhere: RemoteOptions) -> None:
    """State stays under a parameter while another stands in its place."""
    twins = Twins("Adagrad", {"lr": 0.1}, anywhere, start=drawn(0, SHAPES))
    twins.train(2)
    old = replace(twins, 1)
    twins.train(2, first=3)
    for optimizer, ps, p in ((twins.ours, twins.here, old[0]), (twins.theirs, twins.there, old[1])):
        optimizer.param_groups[0]["params"][1] = ps[1] = p
    twins.train(2, first=5)
    check_parameters(twins.here, twins.there)
    check_equal([twins.ours.state[old[0]]["sum"]], [twins.theirs.state[old[1]]["sum"]])


def test_state_put_in_the_place_of_all_state_counts(anywhere: RemoteOptions) -> None:
    """A new mapping with the new parameters' state, as one that exchanges parameters may build, is taken on."""
    twins = Twins("Adamax", {}, anywhere, start=drawn(0, SHAPES))
    twins.train(2)
    before = [dict(twins.ours.state), dict(twins.theirs.state)]
    olds = [replace(twins, index) for index in range(len(SHAPES))]
    for place, (optimizer, ps) in enumerate(((twins.ours, twins.here), (twins.theirs, twins.there))):
        each: Any = optimizer
        each.state = type(twins.theirs.state)(
            dict, {p: before[place][old[place]] for p, old in zip(ps, olds, strict=True)}
        )
    twins.train(2, first=3)
    twins.check()


# -- what does not fit ---------------------------------------------------------------------------------------------


def remove(optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[0]
    group["params"] = group["params"][:1] + group["params"][2:]


def reorder(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def reshape(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][1] = parameters(drawn(60, [(3, 3)]))[0]


def cast(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][1] = parameters(drawn(60, [(5,)], torch.float64))[0]


def add(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].append(parameters(drawn(60, [(3, 3)]))[0])


def move(optimizer: torch.optim.Optimizer) -> None:
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop())


CHANGES = pytest.mark.parametrize("change", [remove, reorder, reshape, cast, add, move], ids=lambda each: each.__name__)


def two_groups(ps: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": ps[:3]}, {"params": ps[3:], "lr": 0.3}]


def listed(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    ps = listed(optimizer)
    for index, p in enumerate(ps):
        p.grad = drawn(100 * seed + index, [p.shape], p.dtype)[0]
    optimizer.step()


def without_strangers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a state_dict, once what belongs to parameters that are in no group was taken away."""
    known = set(listed(optimizer))
    for p in [p for p in optimizer.state if p not in known]:
        del optimizer.state[p]
    return optimizer.state_dict()


@CHANGES
@pytest.mark.parametrize("name", ["Adagrad", "Adamax"])
def test_a_private_session_gives_way_to_one_that_fits(
    name: str, change: Callable[[Any], None], place: RemoteOptions
) -> None:
    """Removed, added, reordered, regrouped, other shapes and dtypes: those that stay keep state and version."""
    twins = Twins(name, {}, place, start=drawn(0, SHAPES), grouping=two_groups)
    twins.train(2)
    for optimizer in (twins.ours, twins.theirs):
        change(optimizer)
        for seed in (3, 4):
            step(optimizer, seed)
    assert twins.ours.version == 4
    check_parameters(listed(twins.ours), listed(twins.theirs))
    check_states(without_strangers(twins.ours), without_strangers(twins.theirs))


def test_the_session_that_was_left_is_removed(server: RunningServer, talk: Conversation) -> None:
    """Only the session with the new parameters is on the server."""
    optimizer = Adagrad(parameters(drawn(0, SHAPES)), server=server.url)
    path = f"/v1/sessions/{optimizer.session}"
    remove(optimizer)
    step(optimizer, 1)
    assert talk.control("GET", f"/v1/sessions/{optimizer.session}")["initialised"]
    with pytest.raises(UnknownSession):
        talk.control("GET", path)


@CHANGES
def test_in_a_session_with_a_name_it_is_refused(
    change: Callable[[Any], None], server: RunningServer, talk: Conversation
) -> None:
    """Others may share it: an error in words, nothing changes, and with the parameters back training goes on."""
    place: RemoteOptions = {"kernel": "reference", "server": server.url, "session": f"fits-{change.__name__}"}
    twins = Twins("Adamax", {}, place, start=drawn(0, SHAPES), grouping=two_groups)
    twins.train(2)
    kept: list[Sequence[Tensor]] = [list(group["params"]) for group in twins.ours.param_groups]
    change(twins.ours)
    for refused in (twins.ours.step, twins.ours.pull):
        with pytest.raises(FarstepError, match=r"keeps the parameters.*removed, reordered"):
            refused()
    assert talk.control("GET", f"/v1/sessions/{twins.ours.session}")["version"] == 2
    for group, ps in zip(twins.ours.param_groups, kept, strict=True):
        group["params"] = ps
    twins.train(2, first=3)
    twins.check()


def test_a_session_that_cannot_be_had_changes_nothing(place: RemoteOptions) -> None:
    """A parameter no session can hold is refused, and with the old one back training goes on."""
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, SHAPES))
    twins.train(2)
    session, kept = twins.ours.session, twins.here[1]
    params = twins.ours.param_groups[0]["params"]
    params[1] = torch.ones(3).to(torch.float8_e5m2).requires_grad_()
    with pytest.raises(FarstepError, match="float8"):
        twins.ours.step()
    params[1] = kept
    twins.train(2, first=3)
    twins.check()
    assert twins.ours.session == session


def test_a_parameter_that_became_smaller(place: RemoteOptions) -> None:
    """`p.data = p.data[:2]` is at the same address, and begins a session of that shape."""
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, SHAPES))
    twins.train(1)
    for optimizer, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        optimizer.state.clear()
        ps[1].grad = None
        ps[1].data = ps[1].data[:2]
    twins.train(2, first=2)
    twins.check()


def test_a_parameter_of_another_dtype_behind_the_same_name(place: RemoteOptions) -> None:
    """`module.double()` puts other memory behind the parameters, which begin a session of that dtype."""
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        Adagrad(models[0].parameters(), lr=0.1, **place),
        torch.optim.Adagrad(models[1].parameters(), lr=0.1, foreach=False),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        model.double()
        model(torch.ones(3, dtype=torch.float64)).pow(2).sum().backward()
        optimizer.state.clear()
        optimizer.step()
    check_parameters(list(models[0].parameters()), list(models[1].parameters()))
    assert isinstance(optimizers[0], farstep.optim.RemoteOptimizer)
    assert optimizers[0].version == 1
