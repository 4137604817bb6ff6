"""Whatever a user does with an optimizer, in any order, ours stays like torch's beside it: a model-based test.

The model is `torch.optim` itself. Each rule does one thing to both optimizers; parameters are compared after each,
states whenever somebody looks.
"""

from __future__ import annotations

import copy
from typing import ClassVar

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

from farstep.settings import RemoteOptions
from tests.client.options import NAMES
from tests.client.twins import Twins, check_parameters, drawn, gradients_of, parameters

SHAPES = ((4, 3), (6, 2), (5, 5))
SEEDS = st.integers(1, 10_000)
WHICH = st.integers(0, 20)
MOST_GROUPS = 4


class Anything(RuleBasedStateMachine):
    """Two optimizers and what can be done to them."""

    place: ClassVar[RemoteOptions]

    @initialize(name=st.sampled_from(NAMES))
    def begin(self, name: str) -> None:
        self.twins = Twins(name, {}, self.place, start=drawn(0, SHAPES))
        self.name = name

    def teardown(self) -> None:
        if hasattr(self, "twins"):
            self.twins.check()
            self.twins.ours.close()

    def both(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.twins.ours, self.twins.theirs

    def pair(self, which: int) -> tuple[Tensor, Tensor]:
        index = which % len(self.twins.here)
        return self.twins.here[index], self.twins.there[index]

    # -- steps ------------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS)
    def step(self, seed: int) -> None:
        self.twins.train(1, first=seed)

    @rule(seed=SEEDS, missing=WHICH)
    def step_without_a_gradient(self, seed: int, missing: int) -> None:
        gradients: list[Tensor | None] = [*self.twins.drawn(seed)]
        gradients[missing % len(gradients)] = None
        self.twins.step(gradients)

    @rule(seed=SEEDS)
    def step_with_a_closure(self, seed: int) -> None:
        for optimizer, ps in zip(self.both(), (self.twins.here, self.twins.there), strict=True):

            def closure(ps: list[Tensor] = ps, optimizer: torch.optim.Optimizer = optimizer) -> float:
                optimizer.zero_grad()
                for p, gradient in zip(ps, gradients_of(self.name, seed, ps), strict=True):
                    p.grad = gradient
                return float(seed)

            assert optimizer.step(closure) == seed

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
            self.twins.train(1, first=seed)

    # -- parameters -------------------------------------------------------------------------------------------------

    @rule(which=WHICH, way=st.sampled_from(["in place", "data", "other data"]))
    def edit_a_parameter(self, which: int, way: str) -> None:
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
        for optimizer, ps in zip(self.both(), (self.twins.here, self.twins.there), strict=True):
            old, (new,) = ps[index], parameters(drawn(seed, [ps[index].shape]))
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state and (keep or self.name == "Adagrad"):  # which torch's cannot do without
                optimizer.state[new] = optimizer.state.pop(old)
            else:
                optimizer.state.pop(old, None)
            ps[index] = new

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

    @rule()
    def change_places(self) -> None:
        """Load each one's state into the other."""
        kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.both()]
        for optimizer, state in zip(self.both(), reversed(kept), strict=True):
            optimizer.load_state_dict(state)

    @rule()
    def go_back(self) -> None:
        """Take an older state back after a step."""
        kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.both()]
        self.twins.train(1, first=7)
        for optimizer, state in zip(self.both(), kept, strict=True):
            optimizer.load_state_dict(state)

    @invariant()
    def parameters_are_equal(self) -> None:
        if hasattr(self, "twins"):
            check_parameters(self.twins.here, self.twins.there)


def test_whatever_is_done_both_stay_alike(place: RemoteOptions) -> None:
    """Steps, edits of every kind, loads, late groups, replaced parameters, in any order: ours is torch's bit by bit."""

    class Here(Anything):
        pass

    Here.place = place
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=60, stateful_step_count=15, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )
