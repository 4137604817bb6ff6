"""Every scheduler of `torch.optim.lr_scheduler` on our optimizers: each step has the bits that torch's has.

A scheduler writes `lr`, and some momentum or betas, into the groups, patches `step` on the instance and keeps a state
of its own. The table names all of them, and a test compares it with torch's module, so that a new one has to be added.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as ls

from farstep.settings import RemoteOptions
from tests.support.client.twins import Twins, drawn

Scheduler = ls.LRScheduler
STEPS = 12

TABLE: dict[str, Callable[[Optimizer], Scheduler]] = {
    "ChainedScheduler": lambda o: ls.ChainedScheduler(
        [ls.ConstantLR(o, 0.5, 3), ls.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ConstantLR": lambda o: ls.ConstantLR(o, factor=0.5, total_iters=4),
    "CosineAnnealingLR": lambda o: ls.CosineAnnealingLR(o, T_max=5, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: ls.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: ls.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2", cycle_momentum=True),
    "ExponentialLR": lambda o: ls.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: ls.LambdaLR(o, lambda epoch: 0.95**epoch),
    "LinearLR": lambda o: ls.LinearLR(o, start_factor=0.2, total_iters=5),
    "MultiplicativeLR": lambda o: ls.MultiplicativeLR(o, lambda epoch: 0.9 + 0.01 * (epoch % 3)),
    "MultiStepLR": lambda o: ls.MultiStepLR(o, [2, 5, 9], gamma=0.3),
    "OneCycleLR": lambda o: ls.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1, three_phase=True),
    "PolynomialLR": lambda o: ls.PolynomialLR(o, total_iters=10, power=2.0),
    "ReduceLROnPlateau": lambda o: ls.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: ls.SequentialLR(o, [ls.LinearLR(o, 0.1, total_iters=3), ls.StepLR(o, 2)], milestones=[4]),
    "StepLR": lambda o: ls.StepLR(o, 3, gamma=0.5),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.05, "momentum": 0.8}, "AdamW": {"lr": 0.05}}


def advance(scheduler: Scheduler, number: int) -> None:
    """Take one step of a scheduler; the plateau's sees a loss that stops falling."""
    if isinstance(scheduler, ls.ReduceLROnPlateau):
        scheduler.step(1.0 / min(number, 4))
    else:
        scheduler.step()


@pytest.mark.promise("Every `torch.optim.lr_scheduler` works, with torch's bits.", area="bits of torch")
def test_the_table_names_every_scheduler_of_torch() -> None:
    """A scheduler that a newer torch adds is not in the table, and this fails until it is."""
    found = {
        name
        for name, each in inspect.getmembers(ls, inspect.isclass)
        if issubclass(each, Scheduler) and each.__module__ == ls.__name__ and not name.startswith("_")
    }
    assert TABLE.keys() == found - {"LRScheduler"}


def parts(twins: Twins, make: Callable[[Optimizer], Scheduler]) -> list[tuple[Optimizer, Scheduler]]:
    return [(each, make(each)) for each in (twins.ours, twins.theirs)]


def steps(twins: Twins, schedulers: list[Scheduler], first: int, last: int, *, exact: bool = True) -> None:
    """Step both optimizers and schedulers, and compare after each step."""
    for number in range(first, last + 1):
        twins.train(1, first=number)
        for scheduler in schedulers:
            advance(scheduler, number)
        twins.check(exact=exact)


@pytest.mark.promise("Every `torch.optim.lr_scheduler` works, with torch's bits.", area="bits of torch")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", TABLE)
def test_a_schedule_has_torchs_bits(name: str, optimizer: str, place: RemoteOptions) -> None:
    """Parameters, state and groups are equal after every step, also after both state_dicts were loaded by others."""
    twins = Twins(optimizer, OPTIMIZERS[optimizer], place)
    make = TABLE[name]
    schedulers = [scheduler for _, scheduler in parts(twins, make)]
    steps(twins, schedulers, 1, STEPS // 2)
    keepers: list[Any] = [twins.ours, twins.theirs, *schedulers]
    saved = [copy.deepcopy(each.state_dict()) for each in keepers]
    resumed = Twins(optimizer, OPTIMIZERS[optimizer], place, start=[p.detach() for p in twins.here])
    others = [scheduler for _, scheduler in parts(resumed, make)]
    keepers = [resumed.ours, resumed.theirs, *others]
    for each, state in zip(keepers, saved, strict=True):
        each.load_state_dict(state)
    steps(resumed, others, STEPS // 2 + 1, STEPS)
    steps(twins, schedulers, STEPS // 2 + 1, STEPS)
    for one, other in zip(resumed.here, twins.here, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_a_schedule_fills_a_learning_rate_that_is_a_tensor(name: str, dtype: torch.dtype, place: RemoteOptions) -> None:
    """The group keeps the caller's tensor, the scheduler writes into it, and the session takes its value.

    torch computes step sizes in the tensor's dtype, the session in float64; they are equal where the tensor is float64
    and no parameter is a scalar, whose product with the tensor torch would take in float64, too.
    """
    lr = torch.tensor(0.05, dtype=dtype)
    start = drawn(0, [(7, 5), (131,)])
    twins = Twins("AdamW", {}, place, grouping=lambda ps: [{"params": ps, "lr": lr.clone()}], start=start)
    given = twins.ours.param_groups[0]["lr"]
    schedulers = [TABLE[name](each) for each in (twins.ours, twins.theirs)]
    steps(twins, schedulers, 1, STEPS, exact=dtype == torch.float64)
    assert twins.ours.param_groups[0]["lr"] is given
    assert given.item() != pytest.approx(0.05)


def test_groups_with_schedules_of_their_own(place: RemoteOptions) -> None:
    """LambdaLR with one function for each group changes the groups apart from each other."""
    twins = Twins("SGD", {"lr": 0.1}, place, grouping=lambda ps: [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.01}])
    functions = [lambda epoch: 0.9**epoch, lambda epoch: 1.0 / (epoch + 1)]
    schedulers: list[Scheduler] = [ls.LambdaLR(each, functions) for each in (twins.ours, twins.theirs)]
    steps(twins, schedulers, 1, 5)


def test_a_schedule_knows_that_a_step_was_taken(place: RemoteOptions, recwarn: pytest.WarningsRecorder) -> None:
    """The scheduler's patch of `step` sees our steps: no warning about the order, and one about none."""
    twins = Twins("SGD", {"lr": 0.1}, place)
    scheduler = ls.StepLR(twins.ours, 2)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    twins = Twins("SGD", {"lr": 0.1}, place)
    scheduler = ls.StepLR(twins.ours, 2)
    twins.train(1)
    scheduler.step()
    assert not [each for each in recwarn if "optimizer.step" in str(each.message)]
