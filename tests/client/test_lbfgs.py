"""farstep.optim.LBFGS beside torch.optim.LBFGS: steps of many evaluations, embedded and through a real server."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import farstep
from farstep.errors import InvalidOption, TensorMismatch
from farstep.settings import RemoteOptions
from tests.support.client.lbfgs import OPTIONS, STEPS, WOLFE, Make, check, check_state, ours, theirs
from tests.support.client.twins import check_equal
from tests.support.optimizers.objectives import (
    Objective,
    cliff,
    network,
    quadratic,
    ripples,
    rosenbrock,
    spiral,
)

pytestmark = pytest.mark.usefixtures("one_thread")


BITS = [
    pytest.param(make, options, id=f"{make.__name__}-{'-'.join(options) or 'defaults'}")
    for make in (quadratic, network, ripples, spiral)
    for options in OPTIONS
    # The search of torch rounds to the dtype of a tensor `lr` (docs/optimizers.md), which only ripples magnify.
    if not (make is ripples and "line_search_fn" in options and isinstance(options.get("lr"), Tensor))
]


@pytest.mark.promise(
    "`LBFGS` takes torch's steps on a server bit for bit, one exchange for each evaluation.",
    area="bits of torch",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("make", "options"), BITS)
def test_twenty_steps_equal_torch_bit_for_bit(
    make: Make, options: dict[str, Any], dtype: torch.dtype, place: RemoteOptions
) -> None:
    """Losses, parameters, evaluations and state_dict are torch's, with each option, in float32 and float64."""
    here, there = make(dtype), make(dtype)
    mine, other = ours(here, **options, nonfinite="allow", **place), theirs(there, **options)
    for _ in range(STEPS):
        torch.testing.assert_close(mine.step(here.closure), other.step(there.closure), rtol=0, atol=0, equal_nan=True)
    check(here, there, mine.state_dict(), other.state_dict())
    assert mine.version == here.evaluations
    mine.close()


def test_the_state_is_torchs_after_each_step(place: RemoteOptions) -> None:
    """Before the first direction, with an empty history and with a full one the state has torch's keys and kinds."""
    here, there = rosenbrock(torch.float64), rosenbrock(torch.float64)
    options = {**WOLFE, "max_iter": 1, "history_size": 3}
    mine, other = ours(here, **options, **place), theirs(there, **options)
    for _ in range(8):
        mine.step(here.closure)
        other.step(there.closure)
        check(here, there, mine.state_dict(), other.state_dict())


def test_a_step_without_a_gradient_only_counts(place: RemoteOptions) -> None:
    """Missing gradients are zeros, which are optimal: the closure is called once and nothing moves, as in torch."""
    here, there = cliff(torch.float32), cliff(torch.float32)
    mine, other = ours(here, **place), theirs(there)
    before = here.parameters[0].detach().clone()
    for optimizer in (mine, other):
        assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert torch.equal(here.parameters[0], before)
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_closure_that_keeps_parameters_in_bounds_works_as_in_torch(place: RemoteOptions) -> None:
    """Edits inside the closure, as style transfer makes them, are part of the step; the step goes on."""
    sides = []
    for make in (lambda p: ours(p, lr=0.5, **place), lambda p: theirs(p, lr=0.5)):
        objective = quadratic(torch.float64)

        def closure(objective: Objective = objective) -> Tensor:
            with torch.no_grad():
                for p in objective.parameters:
                    p.clamp_(-0.8, 0.8)
            return objective.closure()

        optimizer = make(objective)
        for _ in range(3):
            optimizer.step(closure)
        sides.append((objective, optimizer.state_dict()))
    check(sides[0][0], sides[1][0], sides[0][1], sides[1][1])


def test_sparse_gradients_are_made_dense(place: RemoteOptions) -> None:
    """An embedding with sparse gradients trains as in torch."""
    sides = []
    kinds: list[Any] = [partial(farstep.optim.LBFGS, **WOLFE, **place), partial(torch.optim.LBFGS, **WOLFE)]
    for kind in kinds:
        table = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()

        def closure(table: Tensor = table) -> Tensor:
            table.grad = None
            loss = (torch.nn.functional.embedding(torch.tensor([0, 2, 2]), table, sparse=True) - 0.3).pow(2).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer = kind([table])
        for _ in range(3):
            optimizer.step(closure)
        sides.append(table.detach())
    check_equal([sides[0]], [sides[1]])


def test_options_edited_between_steps_hold_from_the_next_one(place: RemoteOptions) -> None:
    """A schedule of the rate and of the number of iterations is followed as by torch."""
    here, there = network(torch.float32), network(torch.float32)
    mine, other = ours(here, lr=0.5, **place), theirs(there, lr=0.5)
    for step in range(6):
        for optimizer in (mine, other):
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            optimizer.param_groups[0]["max_iter"] = 3 + step
        mine.step(here.closure)
        other.step(there.closure)
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_rate_in_a_tensor_counts_as_its_value(place: RemoteOptions) -> None:
    """A tensor `lr` is followed as in torch, if it is another one for each step, and stays a tensor in the groups."""
    here, there = network(torch.float64), network(torch.float64)
    mine, other = ours(here, lr=torch.tensor([0.5]), **place), theirs(there, lr=torch.tensor([0.5]))
    for optimizer, objective in ((mine, here), (other, there)):
        for rate in (0.5, 0.25, 0.1):
            optimizer.param_groups[0]["lr"] = torch.tensor([rate])
            optimizer.step(objective.closure)
    check_equal([p.detach() for p in here.parameters], [p.detach() for p in there.parameters])
    assert torch.equal(mine.param_groups[0]["lr"], other.param_groups[0]["lr"])


# -- errors -----------------------------------------------------------------------------------------------------------


def test_torchs_errors_are_raised(place: RemoteOptions) -> None:
    """Type and words of torch's own: in the constructor, for a missing closure, and for several groups."""
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    wrong: list[dict[str, Any]] = [{"lr": -1.0}, {"lr": torch.ones(2)}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"earning rate|1-element") as expected:
            torch.optim.LBFGS([p], **options)
        with pytest.raises(ValueError, match=r"earning rate|1-element") as found:
            farstep.optim.LBFGS([p], **options, **place)
        assert str(found.value) == str(expected.value)
    groups = [{"params": [p]}, {"params": [q]}]
    with pytest.raises(ValueError, match="doesn't support per-parameter options"):
        farstep.optim.LBFGS(groups, **place)
    optimizer = farstep.optim.LBFGS([p], **place)
    with pytest.raises(TypeError, match=r"step\(\) missing 1 required positional argument: 'closure'"):
        optimizer.step()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="doesn't support per-parameter options"):
        optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_several_dtypes_and_a_fused_kernel_are_refused(place: RemoteOptions) -> None:
    """One vector has one dtype, and no kernel of one pass computes a direction; both are said at construction."""
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TensorMismatch, match="float32 and float64"):
        farstep.optim.LBFGS([p, q], **place)
    with pytest.raises(InvalidOption, match="no fused kernel"):
        farstep.optim.LBFGS([p], **cast(RemoteOptions, {**place, "kernel": "fused"}))


def test_an_unknown_line_search_is_refused(place: RemoteOptions) -> None:
    """A session does not begin with it, and a step that comes with it is a RuntimeError, in torch's words."""
    objective = cliff(torch.float32)
    with pytest.raises(InvalidOption, match="only 'strong_wolfe' is supported"):
        ours(objective, line_search_fn="weak", **place)
    optimizer = ours(objective, **place)
    optimizer.param_groups[0]["line_search_fn"] = "weak"
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        optimizer.step(objective.closure)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_closure_that_raises_leaves_an_optimizer_that_works(search: str | None, place: RemoteOptions) -> None:
    """The error comes through; the next step begins where the parameters are, with the state of the step before."""
    objective = network(torch.float64)
    optimizer = ours(objective, line_search_fn=search, **place)
    optimizer.step(objective.closure)
    left = copy.deepcopy(optimizer.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("in the middle")
        return objective.closure()

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    check_state(optimizer.state_dict(), left)
    there = Objective([p.detach().clone().requires_grad_() for p in objective.parameters], lambda: torch.zeros(()))
    twin_loss = network(torch.float64)
    with torch.no_grad():
        for p, q in zip(twin_loss.parameters, there.parameters, strict=True):
            p.copy_(q)
    twin = theirs(twin_loss, line_search_fn=search)
    twin.load_state_dict(left)
    optimizer.step(objective.closure)
    twin.step(twin_loss.closure)
    check_equal([p.detach() for p in objective.parameters], [p.detach() for p in twin_loss.parameters])


@pytest.mark.parametrize("smaller", [2, 3])
def test_a_history_that_is_lowered_while_it_is_longer_grows_on_as_torchs(smaller: int, place: RemoteOptions) -> None:
    """A pair goes when there are exactly `history_size`; the bits stay torch's as long as torch trains on."""
    here, there = network(torch.float64), network(torch.float64)
    options = {**WOLFE, "max_iter": 2, "history_size": 20}
    mine, other = ours(here, **options, **place), theirs(there, **options)
    for step in range(12):
        if step == 4:  # with three pairs
            for optimizer in (mine, other):
                optimizer.param_groups[0]["history_size"] = smaller
        mine.step(here.closure)
        other.step(there.closure)
        check(here, there, mine.state_dict(), other.state_dict())
    assert len(other.state_dict()["state"][0]["old_dirs"]) == {2: 11, 3: 3}[smaller]
    mine.close()


@pytest.mark.parametrize(
    "options", [{"history_size": 0}, {**WOLFE, "max_eval": 0}, {"line_search_fn": "weak"}], ids=lambda each: [*each][-1]
)
def test_options_with_which_every_step_would_fail_are_refused_at_once(
    options: dict[str, Any], place: RemoteOptions
) -> None:
    """The constructor of torch takes them, and its step ends in an IndexError or the like; here they are named."""
    with pytest.raises(InvalidOption) as refused:
        ours(network(torch.float64), **options, **place)
    assert refused.value.field in options
