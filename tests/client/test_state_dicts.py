"""`state_dict` and `load_state_dict`: interchangeable with torch's, and refused whole where they do not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from farstep.settings import RemoteOptions
from tests.support.client.options import BY_OPTIONS, NAMES, three_groups
from tests.support.client.twins import Twins, check_parameters, check_states, drawn, parameters, theirs


@pytest.mark.promise(
    "A `state_dict` moves between torch and farstep in both directions, and training goes on bit for bit.",
    area="bits of torch",
)
@pytest.mark.parametrize(("name", "options"), BY_OPTIONS)
def test_training_goes_on_in_torch_and_comes_back(name: str, options: dict[str, Any], place: RemoteOptions) -> None:
    """A state_dict of ours loads into torch's and one of torch's into ours, and both go on bit for bit."""
    twins = Twins(name, options, place)
    twins.train(3)
    away = Twins(name, options, place, start=twins.here)
    away.theirs.load_state_dict(twins.ours.state_dict())
    away.ours.load_state_dict(twins.theirs.state_dict())
    check_states(away.ours.state_dict(), twins.theirs.state_dict())
    for seed in range(4, 9):
        for each in (twins, away):
            each.step(each.drawn(seed))
    check_parameters(away.here, twins.there)
    check_parameters(away.there, twins.there)
    away.check()
    check_states(away.ours.state_dict(), twins.theirs.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_fresh_optimizer_is_torchs(name: str, place: RemoteOptions) -> None:
    """Before the first step only Adagrad has state; a state without any loads, and takes what was there away."""
    twins = Twins(name, {}, place)
    twins.check()
    fresh = copy.deepcopy(twins.theirs.state_dict())
    twins.train(2)
    twins.ours.load_state_dict(fresh)
    check_states(twins.ours.state_dict(), Twins(name, {}, place).theirs.state_dict())


def test_a_state_dict_stays_as_it_was_given(place: RemoteOptions) -> None:
    """Later steps do not change the tensors of a state_dict, nor take them away."""
    twins = Twins("Adamax", {}, place)
    twins.train(2)
    given = twins.ours.state_dict()
    kept = [value.clone() for value in given["state"][0].values()]
    twins.train(2, first=3)
    for value, before in zip(given["state"][0].values(), kept, strict=True):
        assert torch.equal(value, before)


def test_parameters_that_never_had_a_gradient_have_no_state(place: RemoteOptions) -> None:
    """State belongs to parameters that took a step, before and after it was loaded."""
    twins = Twins("Adadelta", {}, place)
    for seed in (1, 2):
        twins.step([g if index % 2 else None for index, g in enumerate(drawn(seed))])
    twins.check()
    twins.ours.load_state_dict(twins.theirs.state_dict())
    twins.check()
    twins.train(3, first=3)
    twins.check()


def test_older_forms_of_state_load(place: RemoteOptions) -> None:
    """step, eta and mu as Python numbers, as torch had them before 2.0, mean the same."""
    twins = Twins("ASGD", {"t0": 1}, place)
    twins.train(3)
    old = copy.deepcopy(twins.theirs.state_dict())
    for own in old["state"].values():
        own.update({key: own[key].item() for key in ("step", "eta", "mu")})
    twins.ours.load_state_dict(old)
    twins.train(3, first=4)
    check_parameters(twins.here, twins.there)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(place: RemoteOptions) -> None:
    """Another count of groups or parameters, another optimizer's state, another shape: a ValueError, and all stays."""
    twins = Twins("Adagrad", {"lr": 0.1}, place)
    twins.train(2)
    fewer = theirs("Adagrad")(parameters(drawn(0)[:2])).state_dict()
    groups = theirs("Adagrad")(three_groups(parameters(drawn(0)))).state_dict()
    stranger = Twins("Adamax", {"lr": 0.7}, place)
    stranger.train(1)
    shaped = twins.theirs.state_dict()
    shaped = {**shaped, "param_groups": [{**shaped["param_groups"][0], "lr": 0.7}]}
    shaped["state"] = {**shaped["state"], 1: {**shaped["state"][1], "sum": torch.ones(6)}}
    for bad in (fewer, groups, stranger.theirs.state_dict(), shaped):
        with pytest.raises(ValueError, match="loaded state dict"):
            twins.ours.load_state_dict(bad)
        twins.check()
    twins.train(2, first=3)
    twins.check()
