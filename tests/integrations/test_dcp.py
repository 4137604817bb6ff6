"""`torch.distributed.checkpoint`: saved from a session and resumed in another one, bit by bit, without a step too many.

DCP reads `state_dict()`. Where the state of an optimizer is empty it makes one, by a step with zero gradients and a
learning rate of 0, so that there are tensors to load into. That step is taken in the session like any other: it changes
no parameter, and the state that is loaded afterwards replaces what it left.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.carrying import Counting
from tests.support.client.twins import check_states
from tests.support.integrations.training import Make, batches, loss_of, model, ours, same, theirs
from tests.support.service.servers import RunningServer

NAMES = ["Adagrad", "AdamW", "SGD", "NAdam"]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.05, "momentum": 0.9}}
pytestmark = pytest.mark.filterwarnings(
    # what DCP says, whoever's optimizer it is, about a training in one process and about itself
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
)


class Part:
    """A model with its optimizer."""

    def __init__(self, make: Make, seed: int = 0) -> None:
        self.model = model(seed)
        self.optimizer: Optimizer = make(self.model.parameters())

    def train(self, seed: int) -> Part:
        for inputs, classes in batches(seed):
            self.optimizer.zero_grad()
            torch.autograd.backward(loss_of(self.model, inputs, classes))
            self.optimizer.step()
        return self

    def save(self, path: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        save({"model": weights, "optimizer": state}, checkpoint_id=str(path))

    def load(self, path: Path) -> Part:
        weights, state = get_state_dict(self.model, self.optimizer)
        held: dict[str, Any] = {"model": weights, "optimizer": state}
        load(held, checkpoint_id=str(path))
        set_state_dict(self.model, self.optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
        return self


def makers(name: str, place: RemoteOptions) -> tuple[Make, Make]:
    options = OPTIONS.get(name, {"lr": 0.05})
    return ours(name, place, **options), theirs(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_equals_an_uninterrupted_one(name: str, place: RemoteOptions, tmp_path: Path) -> None:
    """Saved, loaded by a new model and optimizer, and trained on: equal to ours that went on, and to torch's."""
    make, plain = makers(name, place)
    went_on = Part(make).train(1)
    went_on.save(tmp_path / "checkpoint")
    went_on.train(2)
    resumed = Part(make, seed=5).load(tmp_path / "checkpoint").train(2)
    there = Part(plain).train(1).train(2)
    same(resumed.model, went_on.model)
    same(resumed.model, there.model)
    check_states(resumed.optimizer.state_dict(), there.optimizer.state_dict())


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_checkpoints_are_interchangeable_with_torchs(direction: str, place: RemoteOptions, tmp_path: Path) -> None:
    """What one of them saved the other one loads."""
    one, other = makers("AdamW", place) if direction == "to torch" else makers("AdamW", place)[::-1]
    saved = Part(one).train(1)
    saved.save(tmp_path / "checkpoint")
    resumed = Part(other, seed=5).load(tmp_path / "checkpoint").train(2)
    same(resumed.model, saved.train(2).model)


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_the_state_changes_no_parameter(name: str, place: RemoteOptions) -> None:
    """Before the first step DCP makes a state, by one step with a learning rate of 0; afterwards it only reads."""
    make, plain = makers(name, place)
    here, there = Part(make), Part(plain)
    for part in (here, there):
        get_optimizer_state_dict(part.model, part.optimizer)
    same(here.model, there.model)
    assert isinstance(here.optimizer, RemoteOptimizer)
    made = here.optimizer.version
    assert made == (0 if name == "Adagrad" else 1)
    assert [group["lr"] for group in here.optimizer.param_groups] == [0.05]
    check_states(here.optimizer.state_dict(), there.optimizer.state_dict())
    get_optimizer_state_dict(here.model, here.optimizer)
    assert here.optimizer.version == made
    here.train(1)
    steps = here.optimizer.version
    get_optimizer_state_dict(here.model, here.optimizer)
    assert here.optimizer.version == steps
    same(here.model, there.train(1).model)


def test_setting_what_was_just_read_moves_no_tensor(server: RunningServer) -> None:
    """A round trip through DCP's form of an unchanged state sends nothing at all."""
    transport = Counting()
    make, _ = makers("AdamW", {"server": server.url, "kernel": "reference", "transport": transport})
    part = Part(make).train(1)
    read = get_optimizer_state_dict(part.model, part.optimizer)

    def set_it() -> None:
        set_optimizer_state_dict(part.model, part.optimizer, read)

    assert transport.during(set_it) == 0


@pytest.mark.parametrize("flat", [False, True])  # torch does not load what is both flat and full
def test_a_flattened_state_and_a_full_one_on_the_cpu(flat: bool, place: RemoteOptions) -> None:
    """DCP's options for portable checkpoints work: names in place of nested maps, copies on the CPU."""
    make, plain = makers("AdamW", place)
    options = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=not flat, cpu_offload=True)
    here, there = Part(make).train(1), Part(plain).train(1)
    states = [get_optimizer_state_dict(part.model, part.optimizer, options=options) for part in (here, there)]
    assert states[0].keys() == states[1].keys()
    loaded = Part(make, seed=5)
    loaded.model.load_state_dict(copy.deepcopy(here.model.state_dict()))
    set_optimizer_state_dict(loaded.model, loaded.optimizer, states[1], options=options)
    same(loaded.train(2).model, there.train(2).model)


def test_a_model_in_two_groups(place: RemoteOptions, tmp_path: Path) -> None:
    """Groups with options of their own come back to the parameters they belong to."""

    def grouped(make_: Any) -> Make:
        return lambda params: make_(
            [{"params": each, "lr": lr} for each, lr in zip(halves(params), (0.1, 0.01), strict=True)]
        )

    def halves(params: Any) -> list[Any]:
        listed = list(params)
        return [listed[:2], listed[2:]]

    make, plain = (grouped(each) for each in makers("AdamW", place))
    saved = Part(make).train(1)
    saved.save(tmp_path / "checkpoint")
    resumed = Part(make, seed=5).load(tmp_path / "checkpoint").train(2)
    same(resumed.model, Part(plain).train(1).train(2).model)
