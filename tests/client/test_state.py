"""`optimizer.state` reads like torch's and moves only what is read; what was read can be loaded again for nothing."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from farstep.settings import RemoteOptions
from tests.support.client.carrying import LARGE_BYTES, Counting
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_states, check_value, drawn, parameters
from tests.support.service.servers import RunningServer

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
