"""Gradients after a step: nobody but the user keeps them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from farstep.conversation import Conversation
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import gradients_of, ours, parameters, start_of

POLICIES: tuple[RemoteOptions, ...] = ({}, {"clip_norm": 1e-3}, {"accumulate": 2}, {"ema": 0.9})
SHAPES = ((300, 300), (4, 4))


def step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step(lambda: 1.0)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_freed_by_zero_grad(name: str, policy: RemoteOptions, place: RemoteOptions) -> None:
    """After `zero_grad()` no gradient is alive: large, small, transposed or sparse, stepped with or accumulated."""
    if name == "LBFGS" and policy:
        pytest.skip("LBFGS takes no policy")
    values = [*start_of(name), torch.zeros(SHAPES[0]), torch.zeros(SHAPES[1])]
    ps = [*parameters(values), torch.zeros(SHAPES[0]).t().requires_grad_()]
    options: RemoteOptions = {**place, **policy}
    optimizer = ours(name)(ps, **options)
    for seed in range(3):
        for p, gradient in zip(ps, gradients_of(name, seed, ps), strict=True):
            p.grad = gradient
        there = [p.grad for p in ps if p.grad is not None]
        parts = [each._values() if each.is_sparse else each for each in there]
        kept = [weakref.ref(part.untyped_storage()) for part in parts] + [weakref.ref(part) for part in parts]
        del gradient, parts, there
        step(optimizer)
        optimizer.zero_grad()
        assert [ref() for ref in kept] == [None] * len(kept)
    optimizer.close()


@pytest.mark.parametrize("name", ["SparseAdam", "SGD"])
def test_a_sum_of_rounds_is_not_the_users_to_change(name: str, place: RemoteOptions) -> None:
    """Gradients that wait for others of their step are as they were pushed, whatever is written into them since."""
    options: RemoteOptions = {**place, "accumulate": 2}
    ends = []
    for overwritten in (False, True):
        ps = parameters(start_of("SparseAdam"))
        optimizer = ours(name)(ps, lr=0.1, **options)
        for seed in (1, 2):
            for p, gradient in zip(ps, gradients_of("SparseAdam", seed, ps), strict=True):
                p.grad = gradient
            optimizer.step()
            for p in ps if overwritten else ():
                assert p.grad is not None
                p.grad._values().fill_(100.0)
        ends.append(ps)
        optimizer.close()
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_a_conversation_that_is_dropped_goes_at_once() -> None:
    """Its sockets do not stay open until a collector comes by."""
    gc.disable()
    try:
        conversation = Conversation("http://127.0.0.1:9", None)
        dropped = weakref.ref(conversation)
        del conversation
        assert dropped() is None
    finally:
        gc.enable()
