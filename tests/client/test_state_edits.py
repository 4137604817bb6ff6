"""Edits of `optimizer.state` act at the next step, as torch's do, and only they are sent."""

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
from tests.support.client.carrying import Counting
from tests.support.client.twins import Twins, check_equal, drawn


def both(twins: Twins) -> tuple[RemoteOptimizer, torch.optim.Optimizer]:
    return twins.ours, twins.theirs


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
