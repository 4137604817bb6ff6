"""Go remote and come home: a running torch optimizer moves into a session, and back, and no bit tells."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import farstep
from farstep.conversation import Conversation
from farstep.errors import FarstepError, InvalidOption
from farstep.settings import RemoteOptions
from tests.support.client.options import BY_OPTIONS, NAMES, REAL, three_groups
from tests.support.client.twins import (
    Twins,
    check_parameters,
    check_states,
    drawn,
    gradients_of,
    parameters,
    plain,
    start_of,
    theirs,
)
from tests.support.service.servers import RunningServer


class Movers:
    """Two torch optimizers that take the same steps, one of which moves.

    Args:
        name: which optimizer.
        options: torch's own.
    """

    def __init__(self, name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        start = start_of(name, dtype)
        self.here, self.there = parameters(start), parameters(start)
        options = plain(name, options)
        self.name = name
        self.mover = theirs(name)(three_groups(self.here), **options)
        self.stayer = theirs(name)(three_groups(self.there), **options)

    def train(self, first: int, steps: int = 2) -> None:
        for seed in range(first, first + steps):
            for p, q, g in zip(self.here, self.there, gradients_of(self.name, seed, self.here), strict=True):
                p.grad, q.grad = g.clone(), g.clone()
            self.mover.step()
            self.stayer.step()

    def check(self) -> None:
        check_parameters(self.here, self.there)
        check_states(self.mover.state_dict(), self.stayer.state_dict())


@pytest.mark.promise(
    "`farstep.remote` moves a running optimizer to a server and `to_local` brings it home, bit for bit.",
    area="bits of torch",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), BY_OPTIONS)
def test_it_goes_remote_and_comes_home_bit_for_bit(
    name: str, options: dict[str, Any], dtype: torch.dtype, place: RemoteOptions
) -> None:
    """Groups, options, state and parameters continue as if nothing had moved, twice."""
    movers = Movers(name, options, dtype)
    for first in (1, 7):
        movers.train(first)
        movers.mover = farstep.remote(movers.mover, **place)
        assert type(movers.mover) is getattr(farstep.optim, name)
        movers.check()
        movers.train(first + 2)
        movers.check()
        movers.mover = movers.mover.to_local()
        assert type(movers.mover) is getattr(torch.optim, name)
        movers.check()
        movers.train(first + 4)
        movers.check()


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("SGD", "momentum", 0.9),
        ("Adam", "amsgrad", True),
        ("RMSprop", "momentum", 0.9),
        ("RMSprop", "centered", True),
    ],
)
def test_state_that_only_some_groups_and_parameters_have_moves(
    name: str, option: str, value: Any, place: RemoteOptions
) -> None:
    """One group asks for optional state, and one of its parameters has not stepped: neither gains or loses any."""
    start = drawn(0)
    here, there = parameters(start), parameters(start)
    mover, stayer = (theirs(name)([{"params": ps[:3], option: value}, {"params": ps[3:]}]) for ps in (here, there))
    for first in (1, 5):
        for seed in range(first, first + 4):
            for index, (p, q, g) in enumerate(zip(here, there, drawn(seed), strict=True)):
                missing = index in (1, 4) and seed < 5
                p.grad, q.grad = (None, None) if missing else (g.clone(), g.clone())
            if seed == first + 2:
                mover = farstep.remote(mover, **place)
                assert [p in mover.state for p in here] == [bool(stayer.state.get(q)) for q in there]
            mover.step()
            stayer.step()
            check_parameters(here, there)
            check_states(mover.state_dict(), stayer.state_dict())
        assert isinstance(mover, farstep.optim.RemoteOptimizer)
        mover = mover.to_local()
        check_states(mover.state_dict(), stayer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_optimizer_moves_both_ways(name: str, place: RemoteOptions) -> None:
    """Before the first step there is nothing to move but what torch has at construction."""
    movers = Movers(name, {})
    movers.mover = farstep.remote(movers.mover, **place).to_local()
    movers.check()
    movers.train(1)
    movers.check()


def test_the_torch_optimizer_is_left_as_it_was(place: RemoteOptions) -> None:
    """Neither its groups nor its state change with the remote one's, nor the other way round."""
    movers = Movers("Adamax", {})
    movers.train(1)
    left = movers.mover
    before = copy.deepcopy(left.state_dict())
    movers.mover = there = farstep.remote(left, **place)
    movers.train(3)
    check_states(left.state_dict(), before)
    movers.mover = there.to_local()
    kept = copy.deepcopy(there.state_dict())
    movers.train(5)
    check_states(there.state_dict(), kept)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REAL])  # those are younger, or count in ints
def test_older_forms_of_an_optimizer_move(name: str, place: RemoteOptions) -> None:
    """A state_dict of torch 1.11 to 1.13, with fewer options and numbers in the place of tensors, moves and loads."""
    movers = Movers(name, {})
    movers.train(1)
    older = copy.deepcopy(movers.mover.state_dict())
    for group in older["param_groups"]:
        for key in ("foreach", "maximize", "capturable", "differentiable", "fused"):
            if not group.get(key):
                group.pop(key, None)
    for own in older["state"].values():
        own.update({key: int(own[key]) for key in ("step",) if key in own})
        own.update({key: own[key].item() for key in ("eta", "mu") if key in own})
    loaded = theirs(name)(three_groups(movers.here))
    loaded.load_state_dict(older)
    reference = copy.deepcopy(loaded.state_dict())
    movers.mover = farstep.remote(loaded, **place)
    check_states(movers.mover.state_dict(), reference)
    movers.mover.load_state_dict(older)
    check_states(movers.mover.state_dict(), reference)
    movers.train(3)
    check_parameters(movers.here, movers.there)


def test_what_schedulers_and_users_keep_moves_along(place: RemoteOptions) -> None:
    """initial_lr and other keys of a group, names of parameters and entries of the user's survive both ways."""
    model = nn.Linear(3, 2)
    local = theirs("Adagrad")(model.named_parameters(), lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(local, 0.9)
    local.step()
    scheduler.step()
    local.param_groups[0]["note"] = "mine"
    local.state[model.bias]["seen"] = "yes"
    moved = farstep.remote(local, **place)
    for each in (moved, moved.to_local()):
        (group,) = each.param_groups
        assert {key: group[key] for key in ("initial_lr", "lr", "note", "param_names")} == {
            "initial_lr": 0.5,
            "lr": 0.45,
            "note": "mine",
            "param_names": ["weight", "bias"],
        }
        assert each.state[model.bias]["seen"] == "yes"
        resumed = lr_scheduler.ExponentialLR(each, 0.9, last_epoch=0)
        each.step()
        resumed.step()
        assert resumed.get_last_lr() == pytest.approx([0.5 * 0.9**2])
        group["lr"] = 0.45


def test_an_optimizer_farstep_does_not_have_is_refused() -> None:
    """The error names the class, and those there are; a subclass may do anything, so it is not taken for its base."""

    class Mine(torch.optim.Adagrad):
        pass

    ps = parameters(drawn(0))
    for strange in (Mine(ps), farstep.optim.Adagrad(ps)):
        with pytest.raises(
            InvalidOption, match=rf"{type(strange).__name__}\..*ASGD, Adadelta, Adafactor, Adagrad, Adam,"
        ):
            farstep.remote(strange)


def test_a_differentiable_one_is_refused() -> None:
    """Autograd would have to run through a step on another machine, whether the optimizer or a group says so."""
    ps = parameters(drawn(0))
    by_group = theirs("Adamax")([{"params": ps, "differentiable": True}])
    for local in (theirs("Adamax")(ps, differentiable=True), by_group):
        with pytest.raises(InvalidOption, match="autograd"):
            farstep.remote(local)


def test_a_state_that_does_not_fit_is_refused_and_leaves_no_session(
    place: RemoteOptions, server: RunningServer, talk: Conversation
) -> None:
    """A part of the state that is missing or has another shape: a ValueError, and the server has no session more."""
    movers = Movers("Adamax", {})
    movers.train(1)
    before = len(talk.control("GET", "/v1/sessions"))
    own = movers.mover.state[movers.here[0]]
    own["exp_avg"] = torch.ones(3)
    with pytest.raises(ValueError, match="exp_avg"):
        farstep.remote(movers.mover, **place)
    del own["exp_avg"]
    with pytest.raises(ValueError, match="exp_avg"):
        farstep.remote(movers.mover, **place)
    assert len(talk.control("GET", "/v1/sessions")) == before


def test_a_session_that_has_begun_keeps_its_own(server: RunningServer) -> None:
    """Who moves into a session of others takes its parameters and its state."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "session": "moved-into"}
    twins = Twins("Adagrad", {"lr": 0.1}, place)
    twins.train(2)
    ps = parameters(drawn(5))
    local = theirs("Adagrad")(ps, lr=0.1, foreach=False)
    for p in ps:
        p.grad = torch.ones_like(p)
    local.step()
    moved = farstep.remote(local, **place)
    check_parameters(ps, twins.there)
    check_states(moved.state_dict(), twins.theirs.state_dict())


def test_a_closed_optimizer_does_not_come_home(place: RemoteOptions) -> None:
    """Its state is gone, and the error says that it was closed."""
    twins = Twins("Adagrad", {}, place)
    twins.ours.close()
    with pytest.raises(FarstepError, match="was closed"):
        twins.ours.to_local()
