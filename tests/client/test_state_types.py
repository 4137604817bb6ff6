"""Of which types the entries of a state are: torch's, for every optimizer, after a step and after a load."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import InvalidOption
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES, has
from tests.support.client.twins import Twins, drawn, ours, theirs

MORE: dict[str, dict[str, Any]] = {
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
}
"""Options with which there is more state."""


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Set torch's default dtype, which the numbers of a state have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def form(value: Any) -> Any:
    """Return what a value is, without its numbers."""
    if isinstance(value, list):
        return [form(each) for each in value]
    return (value.dtype, value.shape, value.device) if isinstance(value, Tensor) else type(value)


def forms(
    name: str, make: Any, given: dict[str, Any], steps: int, dtype: torch.dtype | None = None, **place: Any
) -> list[dict[str, Any]]:
    """Return the forms of a state after some steps, and after a load into another optimizer and a step more."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype))
    optimizer = make([p], **given, **place)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((p - 1) ** 2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step() -> None:
        if name == "LBFGS":
            optimizer.step(closure)
            return
        gradient = torch.randn(4, 3, generator=generator).to(dtype)
        p.grad = gradient.to_sparse(1) if name == "SparseAdam" else gradient
        optimizer.step()

    def found() -> dict[str, Any]:
        return {key: form(value) for key, value in optimizer.state_dict()["state"][0].items()}

    for _ in range(steps):
        step()
    stepped, state = found(), copy.deepcopy(optimizer.state_dict())
    optimizer = make([p], **given, **place)
    optimizer.load_state_dict(state)
    loaded = found()
    step()
    return [stepped, loaded, found()]


def variants() -> Iterator[Any]:
    for name in NAMES:
        yield pytest.param(name, MORE.get(name, {}), id=name)
        if has(name, "fused"):
            yield pytest.param(name, {**MORE.get(name, {}), "fused": True}, id=f"{name}-fused")
    for options in ({"lr": 1}, {"lr": 1.0}, {"lr": 0.5}, {"lr": torch.tensor(1.0)}, {"lr": torch.tensor(0.5)}):
        for search in (None, "strong_wolfe"):
            for most in (1, 2, 20):
                name = f"LBFGS-{options['lr']!r}-{search}-{most}"
                yield pytest.param("LBFGS", {**options, "line_search_fn": search, "max_iter": most}, id=name)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_a_state_has_torchs_types(name: str, options: dict[str, Any], steps: int, default: torch.dtype) -> None:
    """Numbers are ints, floats or tensors of the dtype that torch gives them, with each kind of learning rate."""
    if default == torch.float64 and name in ("ASGD", "NAdam"):  # whose numbers a session has in float32
        with pytest.raises(InvalidOption, match="default dtype"):
            forms(name, ours(name), options, steps, kernel="reference")
        return
    mine = forms(name, ours(name), options, steps, kernel="reference")
    assert mine == forms(name, theirs(name), options, steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex128], ids=str)
@pytest.mark.parametrize("name", ["ASGD", "NAdam"])
def test_numbers_go_on_in_the_dtype_that_a_load_gives_them(name: str, dtype: torch.dtype, place: RemoteOptions) -> None:
    """From a load on torch rounds eta, mu and mu_product to the parameter's dtype: so does a session, and a copy."""
    options = {"ASGD": {"lr": 0.1, "lambd": 0.1, "t0": 2}, "NAdam": {"lr": 0.1}}[name]
    twins = Twins(name, options, place, start=drawn(0, [(64,)], dtype))
    twins.train(3)
    twins.check()
    for each in (twins.ours, twins.theirs):
        each.load_state_dict(copy.deepcopy(each.state_dict()))
    twins.check()
    twins.train(3, first=4)
    twins.check()
    twins.ours, twins.theirs = copy.deepcopy((twins.ours, twins.theirs))
    twins.here, twins.there = (each.param_groups[0]["params"] for each in (twins.ours, twins.theirs))
    twins.train(3, first=7)
    twins.check()
    (state,) = twins.ours.state_dict()["state"].values()
    number = {"ASGD": "eta", "NAdam": "mu_product"}[name]
    assert state[number].dtype == (torch.float32 if dtype.is_complex else dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "LBFGS"])
def test_a_state_of_other_dtypes_has_torchs_types(name: str, dtype: torch.dtype) -> None:
    """After a step, after a load, which casts, and after a step that follows."""
    mine = forms(name, ours(name), MORE.get(name, {}), 2, dtype, kernel="reference")
    assert mine == forms(name, theirs(name), MORE.get(name, {}), 2, dtype)


@pytest.mark.parametrize("lr", [1, 1.0, torch.tensor(1.0)], ids=repr)
def test_the_step_length_of_lbfgs_is_torchs_everywhere(lr: Any, place: RemoteOptions) -> None:
    """A rate is its own step length after the first iteration: the int 1, the float, or a tensor as the group's is."""
    mine = forms("LBFGS", ours("LBFGS"), {"lr": lr}, 2, **place)
    assert mine == forms("LBFGS", theirs("LBFGS"), {"lr": lr}, 2)
