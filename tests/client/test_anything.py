"""Whatever a user does with an optimizer, in any order, ours stays like torch's beside it: a model-based test.

The model is `torch.optim` itself. Each rule does one thing to both optimizers; parameters are compared after each,
states whenever somebody looks. `MODEL_EXAMPLES` says how many examples are tried (`make model`).
"""

from __future__ import annotations

import copy
import os
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_equal, check_parameters, drawn, gradients_of, parameters

SHAPES = ((4, 3), (6, 2), (5, 5))
SEEDS = st.integers(1, 10_000)
WHICH = st.integers(0, 20)
MOST_GROUPS = 4
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "60"))


class Anything(RuleBasedStateMachine):
    """Two optimizers and what can be done to them."""

    place: ClassVar[RemoteOptions]

    @initialize(name=st.sampled_from(NAMES))
    def begin(self, name: str) -> None:
        self.frozen: set[int] = set()
        self.away: dict[int, tuple[Tensor, Tensor]] = {}
        self.twins = Twins(name, {}, self.place, start=drawn(0, SHAPES))
        self.name = name

    def teardown(self) -> None:
        if hasattr(self, "twins"):
            self.come_back()
            self.twins.check()
            self.twins.ours.close()

    def both(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.twins.ours, self.twins.theirs

    def pair(self, which: int) -> tuple[Tensor, Tensor]:
        index = which % len(self.twins.here)
        return self.twins.here[index], self.twins.there[index]

    def give(self, seed: int, missing: set[int]) -> None:
        """Give gradients to all parameters that may have one."""
        self.twins.give(
            [
                None if index in missing | self.frozen | self.away.keys() else each
                for index, each in enumerate(gradients_of(self.name, seed, self.whole(self.twins.here)))
            ]
        )

    def whole(self, ps: list[Tensor]) -> list[Tensor]:
        """Return tensors of the shapes and dtypes that parameters have when they are there."""
        return [self.away[index][0] if index in self.away else p for index, p in enumerate(ps)]

    def retyped(self) -> bool:
        """Return whether a parameter is away in another dtype, to which torch's load casts its state."""
        return any(self.twins.here[index].dtype != kept.dtype for index, (kept, _) in self.away.items())

    # -- steps ------------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS)
    def step(self, seed: int) -> None:
        self.give(seed, set())
        self.step_both()

    @rule(seed=SEEDS, missing=WHICH)
    def step_without_a_gradient(self, seed: int, missing: int) -> None:
        self.give(seed, {missing % len(self.twins.here)})
        self.step_both()

    @rule(seed=SEEDS)
    def step_with_a_closure(self, seed: int) -> None:
        for optimizer in self.both():

            def closure(optimizer: torch.optim.Optimizer = optimizer) -> float:
                optimizer.zero_grad()
                self.give(seed, set())
                return float(seed)

            assert optimizer.step(closure) == seed

    def step_both(self) -> None:
        for optimizer in self.both():
            optimizer.step()

    # -- options ----------------------------------------------------------------------------------------------------

    @rule(which=WHICH, lr=st.sampled_from([0.5, 0.1, 1e-3]))
    def change_a_rate(self, which: int, lr: float) -> None:
        for optimizer in self.both():
            optimizer.param_groups[which % len(optimizer.param_groups)]["lr"] = lr

    @rule(which=WHICH, on=st.booleans())
    def turn_round(self, which: int, on: bool) -> None:
        for optimizer in self.both():
            group = optimizer.param_groups[which % len(optimizer.param_groups)]
            if "maximize" in group:
                group["maximize"] = on

    @precondition(lambda self: len(self.twins.ours.param_groups) < MOST_GROUPS)
    @rule(seed=SEEDS)
    def add_a_group(self, seed: int) -> None:
        fresh = drawn(seed, [(3, 4)])
        for optimizer, ps in zip(self.both(), (self.twins.here, self.twins.there), strict=True):
            late = parameters(fresh)
            optimizer.add_param_group({"params": late, "lr": 0.2})
            ps += late
        if self.name == "Adagrad":  # whose late state torch's has with the first step
            self.step(seed)

    # -- parameters -------------------------------------------------------------------------------------------------

    @rule(which=WHICH, way=st.sampled_from(["in place", "data", "other data"]))
    def edit_a_parameter(self, which: int, way: str) -> None:
        if which % len(self.twins.here) in self.away:
            return
        for p in self.pair(which):
            if way == "in place":
                with torch.no_grad():
                    p.mul_(0.5)
            elif way == "data":
                p.data.clamp_(-0.3, 0.3)
            else:
                p.data = p.data + 1

    @rule(which=WHICH, keep=st.booleans(), seed=SEEDS)
    def replace_a_parameter(self, which: int, keep: bool, seed: int) -> None:
        index = which % len(self.twins.here)
        if index in self.away:
            return
        self.frozen.discard(index)
        for optimizer, ps in zip(self.both(), (self.twins.here, self.twins.there), strict=True):
            old, (new,) = ps[index], parameters(drawn(seed, [ps[index].shape]))
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state and (keep or self.name == "Adagrad"):  # which torch's cannot do without
                optimizer.state[new] = optimizer.state.pop(old)
            else:
                optimizer.state.pop(old, None)
            ps[index] = new

    @rule(which=WHICH, frozen=st.booleans())
    def freeze(self, which: int, frozen: bool) -> None:
        index = which % len(self.twins.here)
        (self.frozen.add if frozen else self.frozen.discard)(index)
        for p in self.pair(which):
            p.requires_grad_(not frozen)
            p.grad = None

    @rule(which=WHICH, way=st.sampled_from(["empty", "half", "flat"]))
    def send_away(self, which: int, way: str) -> None:
        """Offload, retype or reshape a parameter, until `come_back`."""
        index = which % len(self.twins.here)
        if index in self.away or self.name == "LBFGS":
            return
        self.twins.check()  # a replaced one is followed before it is away
        here, there = self.pair(index)
        self.away[index] = here.data, there.data
        for p in (here, there):
            p.grad = None
            if way == "empty":
                p.data = torch.empty(0)
            else:
                p.data = p.data.half() if way == "half" else p.data.reshape(-1).clone()

    @rule()
    def come_back(self) -> None:
        for index, kept in self.away.items():
            self.twins.here[index].data, self.twins.there[index].data = kept
        self.away = {}

    @precondition(lambda self: not self.away)
    @rule(which=WHICH, other=WHICH, seed=SEEDS)
    def tie(self, which: int, other: int, seed: int) -> None:
        """Tie two parameters by their memory: ours refuses the step and changes nothing; untied, both go on."""
        (one, _), (two, _) = self.pair(which), self.pair(other)
        if one is two or one.numel() != two.numel() or not (one.requires_grad and two.requires_grad):
            return
        kept = two.data
        two.data = one.data.view(two.shape)
        self.twins.give(gradients_of(self.name, seed, self.twins.here))
        before = [p.detach().clone() for p in self.twins.here]
        with pytest.raises(TensorMismatch, match="share memory"):
            self.twins.ours.step(lambda: 1.0)
        check_equal([p.detach() for p in self.twins.here], before)
        two.data = kept

    # -- state ------------------------------------------------------------------------------------------------------

    @rule(which=WHICH)
    def edit_state(self, which: int) -> None:
        for optimizer, p in zip(self.both(), self.pair(which), strict=True):
            for value in optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.dim():
                    value.mul_(0.5)

    @precondition(lambda self: self.name != "Adagrad")
    @rule(which=WHICH)
    def take_state_away(self, which: int) -> None:
        for optimizer, p in zip(self.both(), self.pair(which), strict=True):
            optimizer.state.pop(p, None)

    @rule()
    def look(self) -> None:
        self.twins.check()

    @precondition(lambda self: not self.retyped())
    @rule()
    def change_places(self) -> None:
        """Load each one's state into the other."""
        kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.both()]
        for optimizer, state in zip(self.both(), reversed(kept), strict=True):
            optimizer.load_state_dict(state)

    @precondition(lambda self: not self.retyped())
    @rule()
    def go_back(self) -> None:
        """Take an older state back after a step."""
        kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.both()]
        self.step(7)
        for optimizer, state in zip(self.both(), kept, strict=True):
            optimizer.load_state_dict(state)

    @invariant()
    def parameters_are_equal(self) -> None:
        if hasattr(self, "twins"):
            check_parameters(self.twins.here, self.twins.there)


@pytest.mark.promise(
    "Whatever a loop does between steps (edits, loads, added groups, replaced parameters), the bits stay torch's.",
    area="bits of torch",
)
def test_whatever_is_done_both_stay_alike(place: RemoteOptions) -> None:
    """Steps, edits of every kind, loads, late groups, replaced parameters, in any order: ours is torch's bit by bit."""

    class Here(Anything):
        pass

    Here.place = place
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=15, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )
