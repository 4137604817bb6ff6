"""The state of farstep.optim.LBFGS: read, edited, copied, and exchanged with torch.optim.LBFGS."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  # what others do with an optimizer
from collections.abc import Callable
from typing import Any

import pytest
import torch

import farstep
from farstep.errors import TensorMismatch
from farstep.settings import RemoteOptions
from tests.support.client.lbfgs import WOLFE, check, check_state, copied, ours, theirs
from tests.support.client.twins import check_equal
from tests.support.optimizers.objectives import (
    Objective,
    network,
    rosenbrock,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", [{"lr": 0.3}, WOLFE], ids=["fixed", "wolfe"])
def test_going_remote_and_coming_home_changes_no_bit(options: dict[str, Any], place: RemoteOptions) -> None:
    """torch, then remote(), then to_local(): each continues as torch alone would have."""
    alone, moved = network(torch.float32), network(torch.float32)
    reference, optimizer = theirs(alone, **options), theirs(moved, **options)
    for stage in range(3):
        for _ in range(3):
            reference.step(alone.closure)
            optimizer.step(moved.closure)
        if stage == 0:
            optimizer = farstep.remote(optimizer, **place)
        elif stage == 1:
            optimizer = optimizer.to_local()
    check(moved, alone, optimizer.state_dict(), reference.state_dict())
    assert type(optimizer) is torch.optim.LBFGS


@pytest.mark.parametrize("options", [{"lr": 0.3}, WOLFE], ids=["fixed", "wolfe"])
def test_state_dicts_go_both_ways(options: dict[str, Any], place: RemoteOptions) -> None:
    """A state_dict of either side continues on the other as if nothing had happened; a cold start does not."""
    here = network(torch.float64)
    mine = ours(here, **options, **place)
    for _ in range(3):
        mine.step(here.closure)
    there, cold = copied(here, network), copied(here, network)
    other, fresh = theirs(there, **options), theirs(cold, **options)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    again_at = copied(here, network)
    again = ours(again_at, **options, **place)
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    for _ in range(3):
        for optimizer, objective in ((mine, here), (other, there), (again, again_at), (fresh, cold)):
            optimizer.step(objective.closure)
    for objective in (there, again_at):
        check_equal([p.detach() for p in objective.parameters], [p.detach() for p in here.parameters])
    check_state(again.state_dict(), other.state_dict())
    assert not all(torch.equal(p, q) for p, q in zip(cold.parameters, here.parameters, strict=True))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_by_itself(how: Callable[[Any], Any], place: RemoteOptions) -> None:
    """A copy has the state of the original at that moment, and its own session."""
    objective = rosenbrock(torch.float64)
    optimizer = ours(objective, **WOLFE, max_iter=4, **place)
    optimizer.step(objective.closure)
    copied_optimizer, (p,) = how((optimizer, objective.parameters))
    other = rosenbrock(torch.float64)
    twin = Objective([p], lambda: (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum())
    assert copied_optimizer.session != optimizer.session
    for _ in range(3):
        optimizer.step(objective.closure)
        copied_optimizer.step(twin.closure)
    check_equal([p.detach()], [objective.parameters[0].detach()])
    check_state(copied_optimizer.state_dict(), optimizer.state_dict())
    assert other.evaluations == 0


def test_edits_of_the_state_act_on_the_next_step(place: RemoteOptions) -> None:
    """A vector edited in place, an entry of a list replaced, and a cleared state are what torch makes of them."""

    def edit_vector(state: Any) -> None:
        state["d"].mul_(0.5)

    def edit_list(state: Any) -> None:
        state["old_dirs"][-1] = state["old_dirs"][-1] * 1.5

    def clear(state: Any) -> None:
        state.clear()

    for edit in (edit_vector, edit_list, clear):
        here, there = network(torch.float64), network(torch.float64)
        mine, other = ours(here, lr=0.3, max_iter=5, **place), theirs(there, lr=0.3, max_iter=5)
        for step in range(4):
            if step == 2:
                edit(mine.state[here.parameters[0]])
                edit(other.state[there.parameters[0]])
            mine.step(here.closure)
            other.step(there.closure)
        check(here, there, mine.state_dict(), other.state_dict())


def test_reading_the_state_between_steps_changes_nothing(place: RemoteOptions) -> None:
    """Only the first parameter has state, and looking at it sends nothing."""
    here = network(torch.float32)
    optimizer = ours(here, **place)
    optimizer.step(here.closure)
    version = optimizer.version
    assert list(optimizer.state) == [here.parameters[0]]
    assert optimizer.state[here.parameters[0]]["n_iter"] > 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.version == version


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda own: own.update(d=own["d"][:-1]), "d"),
        (lambda own: own.update(old_dirs=own["old_dirs"][:-1]), "old_dirs"),
        (lambda own: own.pop("prev_loss"), "prev_loss"),
        (lambda own: own.pop("n_iter"), "n_iter"),
        (lambda own: own.update(n_iter=-3), "n_iter"),
        (lambda own: own.update(ro=[torch.zeros(()), torch.zeros(2)]), "ro"),
        (lambda own: own.update(t=torch.zeros(2)), "t"),
    ],
    ids=["short vector", "short history", "no loss", "no counter", "negative counter", "ragged list", "long step"],
)
def test_a_state_that_no_session_can_have_is_refused(
    edit: Callable[[dict[str, Any]], Any], said: str, place: RemoteOptions
) -> None:
    """Wrong counts, lengths and numbers are refused by name, and the next step is as if nothing had been tried."""
    here, there = network(torch.float32), network(torch.float32)
    mine, other = ours(here, **place), theirs(there)
    for optimizer, objective in ((mine, here), (other, there)):
        optimizer.step(objective.closure)
    bad = copy.deepcopy(mine.state_dict())
    edit(bad["state"][0])
    with pytest.raises((ValueError, TensorMismatch), match=said):
        mine.load_state_dict(bad)
    for optimizer, objective in ((mine, here), (other, there)):
        optimizer.step(objective.closure)
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_state_on_another_parameter_is_refused(place: RemoteOptions) -> None:
    """The state is the first parameter's; on another one it would be lost."""
    here = network(torch.float32)
    mine = ours(here, **place)
    mine.step(here.closure)
    moved = copy.deepcopy(mine.state_dict())
    moved["state"] = {1: moved["state"][0]}
    with pytest.raises(ValueError, match="the first one's holds it"):
        mine.load_state_dict(moved)
    assert list(mine.state_dict()["state"]) == [0]
