"""Gradients of another dtype than their parameter: torch's bits, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_equal, check_parameters, drawn, gradients_of

SHAPES = ((6, 4), (5, 3), (4, 2))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDER = [(p, g) for p in FLOATS for g in FLOATS if p is not g and torch.promote_types(p, g) is p]
OTHERS = [(p, g) for p in FLOATS for g in FLOATS if p is not g and torch.promote_types(p, g) is not p]
PROMOTED: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"maximize": True}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "maximize": True}),
    ("RMSprop", {"centered": True, "weight_decay": 0.1}),
    ("Adagrad", {}),
    ("Adagrad", {"weight_decay": 0.1, "maximize": True}),
    ("Adadelta", {}),
    ("Adadelta", {"weight_decay": 0.1}),
    ("ASGD", {}),
    ("ASGD", {"weight_decay": 0.1, "maximize": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("NAdam", {"weight_decay": 0.1}),
    ("RAdam", {"weight_decay": 0.1}),
    ("Adamax", {"weight_decay": 0.1}),
]
"""Options whose first operation on a gradient promotes it."""


def give(p: Tensor, gradient: Tensor) -> None:
    """Give a parameter a gradient of any dtype, as every release of torch lets it in."""
    kept, p.grad = p.data, None
    p.data = kept.to(gradient.dtype)
    p.grad = gradient.clone()
    p.data = kept


def error_of(optimizer: Any) -> RuntimeError | None:
    try:
        optimizer.step(lambda: 1.0)
    except RuntimeError as error:
        return error
    return None


def give_both(twins: Twins, seed: int, dtype: torch.dtype, dtypes: dict[int, torch.dtype] | None = None) -> None:
    for index, gradient in enumerate(gradients_of(twins.name, seed, drawn(0, SHAPES))):
        for p in (twins.here[index], twins.there[index]):
            give(p, gradient.to((dtypes or {}).get(index, dtype)))


@pytest.mark.parametrize("of", WIDER, ids=str)
@pytest.mark.parametrize(("name", "options"), PROMOTED, ids=str)
def test_narrower_gradients_are_widened(
    name: str, options: dict[str, Any], of: tuple[torch.dtype, torch.dtype], place: RemoteOptions
) -> None:
    """Where torch promotes them before it does anything else, the steps have torch's bits."""
    parameter, gradient = of
    twins = Twins(name, options, place, start=drawn(0, SHAPES, parameter))
    for seed in range(1, 5):
        give_both(twins, seed, gradient, {1: parameter} if seed == 2 else None)
        twins.ours.step()
        twins.theirs.step()
        assert all(p.grad is not None and p.grad.dtype is gradient for p in twins.here[::2])
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("of", [*WIDER, *OTHERS], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_others_are_refused_or_have_torchs_bits(
    name: str, of: tuple[torch.dtype, torch.dtype], place: RemoteOptions
) -> None:
    """For every optimizer and pair of dtypes: as torch, or an error that names both dtypes, and nothing has changed."""
    parameter, gradient = of
    twins = Twins(name, {"momentum": 0.9} if name == "SGD" else {}, place, start=drawn(0, SHAPES, parameter))
    give_both(twins, 1, gradient)
    refused = error_of(twins.ours)
    if refused is None:
        assert error_of(twins.theirs) is None
        twins.check()
    else:
        cause = refused if isinstance(refused, TensorMismatch) else refused.__cause__
        assert isinstance(cause, TensorMismatch)
        assert f"is {gradient}, the parameter {parameter}" in str(cause)
        if refused is not cause:
            assert str(error_of(twins.theirs)) == str(refused)
        check_equal([p.detach() for p in twins.here], drawn(0, SHAPES, parameter))
        assert twins.ours.version == 0
    twins.ours.close()


def test_each_group_by_itself(place: RemoteOptions) -> None:
    """A group whose options take such gradients does not make another take them, and dtypes may change per step."""
    twins = Twins(
        "SGD", {}, place, start=drawn(0, SHAPES), grouping=lambda ps: [{"params": ps[:1]}, {"params": ps[1:]}]
    )
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[1]["momentum"] = 0.9
    give_both(twins, 1, torch.float32, {0: torch.bfloat16})
    twins.ours.step()
    twins.theirs.step()
    twins.check()
    give_both(twins, 2, torch.float32, {2: torch.bfloat16})
    with pytest.raises(TensorMismatch, match=r"'1\.1' is torch\.bfloat16, the parameter torch\.float32"):
        twins.ours.step()
    for p in (twins.here[2], twins.there[2]):
        give(p, torch.ones(SHAPES[2]))
    twins.ours.step()
    twins.theirs.step()
    twins.check()
    twins.ours.close()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_that_a_backward_pass_makes(place: RemoteOptions) -> None:
    """With `p.grad_dtype = None` autograd leaves gradients in 16 bits, also where they are sent while it goes on."""
    overlap: RemoteOptions = {**place, "overlap": "server" in place}
    twins = Twins("Adagrad", {}, overlap, start=drawn(0, ((300, 200), (5, 3))))
    for seed in range(1, 5):
        for ps in (twins.here, twins.there):
            for p in ps:
                p.grad, p.grad_dtype = None, torch.bfloat16
            parts = [(p * q).sum() for p, q in zip(ps, drawn(seed, ((300, 200), (5, 3))), strict=True)]
            sum(parts[1:], start=parts[0]).backward()  # type: ignore[no-untyped-call]
            assert {p.grad.dtype for p in ps if p.grad is not None} == {torch.bfloat16}
        twins.ours.step()
        twins.theirs.step()
    check_parameters(twins.here, twins.there)
    twins.check()
    twins.ours.close()
