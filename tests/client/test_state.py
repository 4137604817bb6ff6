"""`optimizer.state` reads and writes like torch's, moves only what is read, and sends only what was changed."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import FarstepError
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.client.carrying import Counting
from tests.client.options import NAMES
from tests.client.twins import Twins, check_equal, check_states, check_value, drawn, parameters
from tests.service.servers import RunningServer

SHAPES = [(300, 40), (70,), ()]
LARGE_BYTES = 4 * 300 * 40


@pytest.fixture
def transport() -> Counting:
    return Counting()


@pytest.fixture
def counted(server: RunningServer, transport: Counting) -> Twins:
    """Return an Adamax on the server whose bytes are counted, and torch's, after two steps."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "transport": transport}
    twins = Twins("Adamax", {}, place, start=drawn(0, SHAPES))
    twins.train(2)
    return twins


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_like_torchs(name: str, place: RemoteOptions) -> None:
    """Keys, lengths, membership, entries and defaults are those of torch's mapping, before and after steps."""
    twins = Twins(name, {}, place)
    for steps in (0, 1, 2):
        for seed in range(steps):
            twins.step([g if index % 2 else None for index, g in enumerate(twins.drawn(seed))])
        here, there = twins.ours.state, twins.theirs.state
        assert isinstance(here, defaultdict)
        assert len(here) == len(there)
        assert bool(here) == bool(there)
        assert [p in here for p in twins.here] == [q in there for q in twins.there]
        assert [id(p) for p in here] == [id(p) for p, q in zip(twins.here, twins.there, strict=True) if q in there]
        for p, q in zip(twins.here, twins.there, strict=True):
            if q in there:
                assert here[p].keys() == there[q].keys()
                for key, value in there[q].items():
                    check_value(here[p][key], value)
                    check_value(here.get(p, {})[key], value)
            else:
                assert here.get(p) is None
        assert len(dict(here)) == len(here.items()) == len(here.values()) == len(there)
        assert here == here.copy()
    twins.check()


def test_only_what_is_read_moves(counted: Twins, transport: Counting) -> None:
    """Whether there is state takes a number per parameter; one parameter's state is fetched alone, and once."""
    state, ps = counted.ours.state, counted.here
    assert transport.during(lambda: (len(state), ps[0] in state, list(state))) < 500
    assert transport.during(lambda: state[ps[1]]) < 1500
    assert "segments=1,2" in transport.paths[-1]
    assert transport.during(lambda: state[ps[1]]["exp_avg"].sum()) == 0
    assert transport.during(lambda: state[ps[0]]) > 2 * LARGE_BYTES
    assert transport.during(counted.ours.state_dict) < 500
    assert transport.during(counted.ours.state_dict) == 0
    counted.check()
    counted.train(1, first=3)
    assert transport.during(counted.ours.state_dict) > 2 * LARGE_BYTES
    counted.check()


def test_many_gaps_are_read_at_once(server: RunningServer, transport: Counting) -> None:
    """A URL stays short however many parameters are read here and there."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "transport": transport}
    twins = Twins("Adamax", {}, place, start=drawn(0, [(1,)] * 1500))
    twins.step([g if index % 2 else None for index, g in enumerate(drawn(1, [(1,)] * 1500))])
    twins.check()
    assert max(map(len, transport.paths)) < 1000


def test_entries_under_keys_of_the_users_own_stay(place: RemoteOptions) -> None:
    """What hooks put into state, for a parameter or beside them, survives steps and goes into state_dicts."""
    twins = Twins("Adadelta", {}, place)
    twins.train(1)
    each: Any
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        each.state["beside"] = {"note": 1}
        each.state[ps[1]]["seen"] = "before"
    twins.train(2, first=2)
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        assert each.state[ps[1]].pop("seen") == "before"
        each.state[ps[0]]["seen"] = "after"
    twins.train(1, first=4)
    assert each.state["beside"] == dict(twins.ours.state)["beside"] == {"note": 1}  # type: ignore[index]
    assert "seen" not in twins.ours.state[twins.here[1]]
    here, there = twins.ours.state_dict()["state"], twins.theirs.state_dict()["state"]
    assert here[0].pop("seen") == there[0].pop("seen") == "after"
    assert here["beside"] == there["beside"]


# -- writing ---------------------------------------------------------------------------------------------------------


def edit_in_place(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state[p]["exp_avg"].mul_(2)


def edit_entry(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state[p]["exp_avg"] = torch.ones_like(p)


def edit_number(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state[p]["step"] += 5


def edit_parameter(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state[p] = {key: value + 1 for key, value in optimizer.state[p].items()}


def edit_by_removing(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state.pop(p)


def edit_by_deleting(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    del optimizer.state[p]


def edit_by_emptying(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state[p].clear()


def edit_by_clearing(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state.clear()


def edit_by_replacing(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.state = defaultdict(dict, {p: optimizer.state[p]})


def edit_by_moving(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    # Lightning's way of putting an optimizer on a device.
    for own in optimizer.state.values():
        own.update({key: value.clone() for key, value in own.items() if key != "step"})


EDITS = [
    edit_in_place,
    edit_entry,
    edit_number,
    edit_parameter,
    edit_by_removing,
    edit_by_deleting,
    edit_by_emptying,
    edit_by_clearing,
    edit_by_replacing,
    edit_by_moving,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_act_at_the_next_step(edit: Callable[[Any, Any], None], place: RemoteOptions) -> None:
    """What is written into state by any way torch has counts as it does there, and shows at once in a state_dict."""
    twins = Twins("Adamax", {}, place)
    twins.train(2)
    for read_between in (False, True):
        edit(twins.ours, twins.here[1])
        edit(twins.theirs, twins.there[1])
        if read_between:
            # A parameter whose state was emptied has none in a session, where torch keeps an empty entry.
            here, there = ({i: own for i, own in each.state_dict()["state"].items() if own} for each in both(twins))
            assert here.keys() == there.keys()
            check_equal([here[i][k] for i in here for k in here[i]], [there[i][k] for i in here for k in here[i]])
        twins.train(2, first=3)
        twins.check()


def both(twins: Twins) -> tuple[RemoteOptimizer, torch.optim.Optimizer]:
    return twins.ours, twins.theirs


def test_only_edits_are_sent(counted: Twins, transport: Counting) -> None:
    """A changed number of a small parameter does not take the large one's state along."""
    usual = transport.during(lambda: counted.train(1, first=3))
    for each, ps in ((counted.ours, counted.here), (counted.theirs, counted.there)):
        each.state[ps[1]]["step"] += 5
    assert transport.during(lambda: counted.train(1, first=4)) < usual + 3000
    counted.check()


def test_adagrads_state_begins_anew_when_it_is_removed(place: RemoteOptions) -> None:
    """It begins with the constructor's initial_accumulator_value again, as torch's does."""
    twins = Twins("Adagrad", {"initial_accumulator_value": 0.5, "lr": 0.1}, place)
    twins.train(2)
    twins.ours.state.clear()
    twins.theirs.state.clear()
    twins.train(2, first=3)
    twins.check()


def test_an_edit_that_does_not_fit_is_refused(place: RemoteOptions) -> None:
    """Another shape, or a part that is missing, is a ValueError at the step, and nothing moves until it is mended."""
    twins = Twins("Adamax", {}, place)
    twins.train(2)
    kept = twins.ours.state[twins.here[1]]["exp_avg"]
    before = [p.detach().clone() for p in twins.here]
    twins.ours.state[twins.here[1]]["exp_avg"] = torch.ones(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="exp_avg"):
            twins.ours.step()
        twins.ours.state[twins.here[1]].pop("exp_avg", None)
    check_equal([p.detach() for p in twins.here], before)
    twins.ours.state[twins.here[1]]["exp_avg"] = kept
    twins.train(2, first=3)
    twins.check()


@pytest.mark.parametrize("load", [False, True])
def test_optional_state_comes_and_goes_by_edits(load: bool, place: RemoteOptions) -> None:
    """A momentum buffer that is taken away begins anew, and one that is given counts, edited or loaded."""
    twins = Twins("SGD", {"momentum": 0.9}, place)
    twins.train(2)
    given = copy.deepcopy(twins.ours.state_dict())
    twins.step([g if index else None for index, g in enumerate(drawn(3))])
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        del each.state[ps[1]]
    twins.train(1, first=4)
    twins.check()
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        if load:
            each.load_state_dict({**given, "state": {0: given["state"][0]}})
        else:
            each.state.clear()
            each.state[ps[2]]["momentum_buffer"] = torch.ones_like(ps[2])
    twins.train(2, first=5)
    twins.check()


def test_a_load_adds_and_removes_optional_state(place: RemoteOptions) -> None:
    """State with amsgrad's entry and state without it replace one another, also when all else is equal."""
    twins = Twins("Adam", {"amsgrad": True}, place)
    twins.train(2)
    given = copy.deepcopy(twins.ours.state_dict())
    given["param_groups"][0]["amsgrad"] = False
    without = copy.deepcopy(given)
    for own in without["state"].values():
        del own["max_exp_avg_sq"]
    for each in (without, given, without):
        for optimizer in both(twins):
            optimizer.load_state_dict(copy.deepcopy(each))
        twins.check()
    twins.train(2, first=3)
    twins.check()


def test_the_state_of_a_closed_optimizer_is_gone(place: RemoteOptions) -> None:
    """It lived in the session, and the error says that the optimizer was closed."""
    twins = Twins("Adamax", {}, place)
    twins.train(1)
    twins.ours.close()
    with pytest.raises(FarstepError, match="was closed"):
        twins.ours.state[twins.here[0]]


# -- round trips -----------------------------------------------------------------------------------------------------


def through_a_copy(given: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(given)


def by_moving_tensors(given: dict[str, Any]) -> dict[str, Any]:
    # Accelerate's way: every tensor to the device, step included.
    state = {i: {key: value.to("cpu") for key, value in own.items()} for i, own in given["state"].items()}
    return {**given, "state": state}


@pytest.mark.parametrize("way", [dict, through_a_copy, by_moving_tensors])
def test_loading_what_was_just_read_moves_nothing(
    way: Callable[[dict[str, Any]], dict[str, Any]], counted: Twins, transport: Counting
) -> None:
    """A round trip of an unchanged state sends no bytes, and what was read stays read."""
    given = counted.ours.state_dict()
    assert transport.during(lambda: counted.ours.load_state_dict(way(given))) == 0
    assert transport.during(counted.ours.state_dict) == 0
    counted.check()
    counted.train(2, first=3)
    counted.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_before_the_first_step_is_cheap(name: str, server: RunningServer, transport: Counting) -> None:
    """Accelerate's round trip right after construction sends nothing."""
    optimizer: Any = getattr(torch.optim, name)
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "transport": transport}
    twins = Twins(name, {}, place)
    given = twins.ours.state_dict()
    assert transport.during(lambda: twins.ours.load_state_dict(by_moving_tensors(given))) == 0
    twins.train(2)
    twins.check()
    assert type(twins.theirs) is optimizer


def test_loading_sends_only_what_differs(counted: Twins, transport: Counting) -> None:
    """Of a state that differs in one parameter, only that one's is sent, signs of zeros included."""
    given = copy.deepcopy(counted.ours.state_dict())
    given["state"][1]["exp_avg"].zero_()
    assert 0 < transport.during(lambda: counted.ours.load_state_dict(given)) < 3000
    given["state"][1]["exp_avg"].neg_()
    counted.ours.state_dict()
    assert 0 < transport.during(lambda: counted.ours.load_state_dict(given)) < 3000
    assert counted.ours.state[counted.here[1]]["exp_avg"].signbit().all()
    counted.theirs.load_state_dict(copy.deepcopy(given))
    counted.train(1, first=3)
    counted.check()


def test_a_load_replaces_edits_that_were_not_sent(place: RemoteOptions) -> None:
    """State written since the last step gives way to the state that is loaded."""
    twins = Twins("Adamax", {}, place)
    twins.train(2)
    given = copy.deepcopy(twins.ours.state_dict())
    twins.ours.state[twins.here[0]]["exp_avg"].zero_()
    twins.ours.state.pop(twins.here[1])
    twins.ours.load_state_dict(given)
    twins.train(2, first=3)
    twins.check()


def test_in_a_shared_session_a_state_dict_is_of_now(server: RunningServer) -> None:
    """When another worker has taken a step since, the state is fetched again, and edits not yet sent are sent first."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "session": "shared-state"}
    twins = Twins("Adamax", {}, {**place, "worker": "w0"})
    other = Twins("Adamax", {}, {**place, "worker": "w1"})
    twins.train(1)
    check_states(twins.ours.state_dict(), twins.theirs.state_dict())
    for p, g in zip(other.here, drawn(2), strict=True):
        p.grad = g
    other.ours.step()
    for q, g in zip(twins.there, drawn(2), strict=True):
        q.grad = g
    twins.theirs.step()
    check_states(twins.ours.state_dict(), twins.theirs.state_dict())
    for each, p in ((other.ours, other.here[0]), (twins.theirs, twins.there[0])):
        each.state[p]["exp_avg"].zero_()
    check_states(other.ours.state_dict(), twins.theirs.state_dict())
    check_states(twins.ours.state_dict(), twins.theirs.state_dict())


def test_complex_state_is_compared_bit_by_bit(place: RemoteOptions) -> None:
    """State of complex parameters makes round trips and is edited as any other."""
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, [(3, 2)], torch.complex64))
    twins.train(2)
    twins.ours.load_state_dict(copy.deepcopy(twins.ours.state_dict()))
    for each, p in ((twins.ours, twins.here[0]), (twins.theirs, twins.there[0])):
        each.state[p]["sum"].mul_(2)
    twins.train(2, first=3)
    twins.check()


def test_parameters_that_nobody_knows_have_no_state(place: RemoteOptions) -> None:
    """A stranger's entry is made on access, as by any defaultdict, and the session does not mind."""
    twins = Twins("Adagrad", {}, place)
    (stranger,) = parameters(drawn(3, [(2,)]))
    assert stranger not in twins.ours.state
    assert twins.ours.state[stranger] == {}
    twins.train(2)
    assert stranger in twins.ours.state
