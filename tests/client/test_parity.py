"""Groups, gradients and kernels against torch.optim, embedded and on a real server; `tests/parity/` has each option."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES, three_groups
from tests.support.client.twins import (
    SHAPES,
    Group,
    Twins,
    check_parameters,
    check_states,
    drawn,
    ours,
    parameters,
    start_of,
    theirs,
)

STEPS = 20


def with_holes(seed: int, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients some of which are missing, other ones in each step, and all in some."""
    return [None if (seed + 2 * index) % 5 == 0 or seed % 7 == 3 else g for index, g in enumerate(gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_groups_missing_gradients_and_a_schedule_at_once(name: str, dtype: torch.dtype, place: RemoteOptions) -> None:
    """Groups with their own options, parameters without a gradient in some steps, and a rate that always changes."""
    twins = Twins(name, {"lr": 0.1}, place, grouping=three_groups, start=start_of(name, dtype))
    schedules = [LambdaLR(optimizer, lambda step: 1 / (1 + 0.3 * step)) for optimizer in (twins.ours, twins.theirs)]
    for seed in range(1, STEPS + 1):
        twins.step(with_holes(seed, twins.drawn(seed)))
        for schedule in schedules:
            schedule.step()
    twins.check()


def test_a_group_keeps_its_own_initial_value_to_itself(place: RemoteOptions) -> None:
    """Adagrad starts every sum at the constructor's initial_accumulator_value, whatever a group says, as torch does."""

    def grouping(ps: list[Tensor]) -> list[Group]:
        return [{"params": ps[:2], "initial_accumulator_value": 9.0}, {"params": ps[2:]}]

    twins = Twins("Adagrad", {"initial_accumulator_value": 0.5}, place, grouping=grouping)
    twins.check()
    twins.train(2)
    twins.check()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True}])
def test_complex_and_real_parameters_of_sgd_side_by_side(options: Group, place: RemoteOptions) -> None:
    """Complex numbers between reals of the same memory, more than a block of them too, have torch's bits."""
    shapes = ((5,), (7, 3), (2**16 + 3,), (), (4,), (1,))
    dtypes = (torch.float32, torch.complex64, torch.complex64, torch.float32, torch.complex64, torch.complex128)

    def of(seed: int) -> list[Tensor]:
        return [drawn(seed + i, [shape], dtype)[0] for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]

    twins = Twins("SGD", {"lr": 0.037, "weight_decay": 0.013, **options}, place, start=of(0))
    for step in range(1, 6):
        twins.step([None if (step + index) % 4 == 0 else g for index, g in enumerate(of(10 * step))])
    twins.check()


def test_parameters_of_several_dtypes_in_one_session(place: RemoteOptions) -> None:
    """A session holds parameters of different dtypes in any order, and each is updated in its own."""
    dtypes = [torch.float32, torch.float64, torch.complex64, torch.float32, torch.float64, torch.float32]
    start = [drawn(i, [shape], dtype)[0] for i, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=True))]
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=start)
    for seed in range(1, STEPS + 1):
        twins.step([drawn(seed, [p.shape], p.dtype)[0] for p in start])
    twins.check()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparse_gradients_equal_torch(dtype: torch.dtype, maximize: bool, place: RemoteOptions) -> None:
    """Adagrad takes the gradients of an embedding, beside a dense layer, rows named twice and no row at all."""
    options = {"lr": 0.1, "lr_decay": 0.1, "maximize": maximize, "foreach": False}

    def model() -> nn.ModuleList:
        embedding = nn.Embedding(11, 3, sparse=True, dtype=dtype)
        linear = nn.Linear(3, 2, dtype=dtype)
        for p, values in zip([embedding.weight, *linear.parameters()], drawn(5, [(11, 3), (2, 3), (2,)]), strict=True):
            p.detach().copy_(values)
        return nn.ModuleList([embedding, linear])

    models = [model(), model()]
    optimizers = [
        ours("Adagrad")(models[0].parameters(), **options, **place),
        theirs("Adagrad")(models[1].parameters(), **options),
    ]
    for seed in range(STEPS):
        rows = torch.randint(11, (0 if seed == 4 else 6,), generator=torch.Generator().manual_seed(seed))
        for each, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            each[1](each[0](rows)).pow(2).sum().backward()
            optimizer.step()
    assert models[0][0].weight.grad is not None
    assert models[0][0].weight.grad.is_sparse
    check_parameters(list(models[0].parameters()), list(models[1].parameters()))
    check_states(optimizers[0].state_dict(), optimizers[1].state_dict())


@pytest.mark.parametrize("dims", [1, 2])
def test_sparse_gradients_in_complex_and_of_more_dimensions(dims: int, place: RemoteOptions) -> None:
    """Gradients with one and with two sparse dimensions equal torch, also for complex parameters."""
    start = [*drawn(1, [(3,)]), *drawn(0, [(6, 4, 2)], torch.complex64)]
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=start)
    for seed in range(1, STEPS + 1):
        (dense,) = drawn(seed, [(6, 4, 2)], torch.complex64)
        dense[seed % 6] = 0
        dense[:, seed % 4] = 0
        twins.step([torch.ones(3), dense.to_sparse(dims)])
    twins.check(exact=False)


def test_sparse_gradients_are_refused_where_torch_refuses_them(place: RemoteOptions) -> None:
    """With weight decay, and by every other optimizer, in torch's words; nothing has changed then."""
    for name, options, words in [
        ("Adagrad", {"weight_decay": 0.1}, "weight_decay option is not compatible with sparse gradients"),
        ("SGD", {"weight_decay": 0.1}, r"add\(sparse, dense\) is not supported"),
        ("AdamW", {}, "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("RMSprop", {}, "RMSprop does not support sparse gradients"),
        ("Adadelta", {}, "Adadelta does not support sparse gradients"),
        ("Adamax", {}, "Adamax does not support sparse gradients"),
        ("Adafactor", {}, "Adafactor does not support sparse gradients"),
        ("Muon", {}, "Muon does not support sparse gradients"),
    ]:
        (p,) = parameters(drawn(0, [(4, 2)]))
        before = p.detach().clone()
        optimizer = ours(name)([p], **options, **place)
        p.grad = torch.eye(4, 2).to_sparse(1)
        with pytest.raises(RuntimeError, match=words):
            optimizer.step()
        check_parameters([p], [before])
        p.grad = torch.ones(4, 2)
        optimizer.step()
        assert optimizer.version == 1


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("where", ["embedded", "server", "plain"])
def test_fused_kernels_are_within_torchs_tolerance(kernel: Any, where: str, request: pytest.FixtureRequest) -> None:
    """Compiled kernels follow torch's loop within its tolerance, and the report says which kernel ran."""
    place: RemoteOptions = {"kernel": kernel}
    if where != "embedded":
        place["server"] = request.getfixturevalue("server").url if where == "server" else request.getfixturevalue(where)
    twins = Twins("Adagrad", {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.02}, place)
    twins.train(STEPS)
    twins.check(exact=False)
    assert twins.ours.last_step is not None
    assert twins.ours.last_step.kernel in ({"fused"} if kernel == "fused" else {"fused", "reference"})


def halves(**options: Any) -> Any:
    """Return a grouping whose second half of the parameters has these options."""

    def grouping(ps: list[Tensor]) -> list[Group]:
        return [{"params": ps[:3]}, {"params": ps[3:], **options}]

    return grouping


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"amsgrad": True}),
        ("RMSprop", {"momentum": 0.5}),
        ("RMSprop", {"centered": True, "momentum": 0.5}),
    ],
)
def test_state_that_one_group_has_and_another_has_not(name: str, options: Group, place: RemoteOptions) -> None:
    """State that an option brings is there in its group only, travels both ways, and training goes on with it."""
    twins = Twins(name, {"lr": 0.1}, place, grouping=halves(**options))
    for seed in range(1, 6):
        twins.step(with_holes(seed, drawn(seed)))
        twins.check()
    away = Twins(name, {"lr": 0.1}, place, grouping=halves(**options), start=twins.here)
    away.theirs.load_state_dict(twins.ours.state_dict())
    away.ours.load_state_dict(twins.theirs.state_dict())
    away.check()
    for each in (twins, away):
        each.train(3, first=6)
        each.check()
    check_parameters(away.here, twins.there)


def test_momentum_that_is_switched_on_and_off(place: RemoteOptions) -> None:
    """SGD's buffer appears with the first step that has momentum, stays when there is none, and is used again."""
    twins = Twins("SGD", {"lr": 0.1, "weight_decay": 0.01}, place, grouping=halves(momentum=0.5))
    for seed in range(1, STEPS):
        for optimizer in (twins.ours, twins.theirs):
            optimizer.param_groups[0].update(momentum=0.9 if seed > 5 else 0.0, nesterov=seed > 10)
            optimizer.param_groups[1].update(momentum=0.0 if 4 < seed < 9 else 0.5)
        twins.step(with_holes(seed, drawn(seed)))
        twins.check()


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_sgd_takes_sparse_gradients(dtype: torch.dtype, coalesced: bool, place: RemoteOptions) -> None:
    """Without momentum and weight decay SGD changes the named rows; within tolerance if some are named twice."""
    start = drawn(0, [(9, 4), (5,)], dtype)
    twins = Twins("SGD", {"lr": 0.1, "maximize": True}, place, start=start)
    for seed in range(1, STEPS + 1):
        rows = torch.randint(9, (1, 6), generator=torch.Generator().manual_seed(seed))
        values, dense = drawn(seed, [(6, 4), (5,)], dtype)
        sparse = torch.sparse_coo_tensor(rows, values, (9, 4), check_invariants=True)
        twins.step([sparse.coalesce() if coalesced else sparse, dense])
    twins.check(exact=coalesced and not dtype.is_complex)
