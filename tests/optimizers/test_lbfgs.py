"""The machine of L-BFGS, alone, beside torch.optim.LBFGS: the same evaluations, parameters and memory, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import InvalidOption, NonFinite
from farstep_service.optimizers.lbfgs import LBFGSHyper
from farstep_service.optimizers.lbfgs_steps import Memory, Turn, begin, resume
from tests.support.optimizers.objectives import OBJECTIVES, Objective, network, quadratic, rosenbrock, slope

STEPS = 20
DTYPES = [torch.float32, torch.float64]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1},
    {"line_search_fn": "strong_wolfe"},
    {"line_search_fn": "strong_wolfe", "lr": 0.3, "history_size": 3},
    {"line_search_fn": "strong_wolfe", "max_iter": 7, "max_eval": 4},
    {"line_search_fn": "strong_wolfe", "max_iter": 3, "max_eval": 1},
    {"lr": 0.05, "history_size": 2, "max_iter": 9, "max_eval": 5},
    {"max_iter": 1},
    {"max_iter": 0},
    {"tolerance_grad": 1e-1, "line_search_fn": "strong_wolfe"},
    {"tolerance_change": 1e-2, "lr": 0.2},
]


class Machine:
    """Drive the machine as torch's `step` does, with the parameters of an objective."""

    def __init__(self, objective: Objective, **options: Any) -> None:
        self.objective = objective
        self.hyper = LBFGSHyper.from_options(options)
        self.memory = Memory()

    def step(self) -> float:
        first, turn = None, None
        while turn is None or turn.waiting is not None:
            loss = float(self.objective.closure())
            first = loss if first is None else first
            turn = self.advance(turn, loss)
        self.memory = turn.memory
        return first or 0.0

    def advance(self, turn: Turn | None, loss: float) -> Turn:
        """Take one turn and move the parameters."""
        x, g = self.flat(), self.flat_grad()
        if turn is None or turn.waiting is None:
            after = begin(self.memory, self.hyper, loss, g, x)
        else:
            after = resume(turn.waiting, loss, g, x)
        if after.x is not None:
            self.set(after.x)
        return after

    def flat(self) -> Tensor:
        return torch.cat([real(p.detach()) for p in self.objective.parameters])

    def flat_grad(self) -> Tensor:
        ps = self.objective.parameters
        return torch.cat([real(torch.zeros_like(p) if p.grad is None else p.grad) for p in ps])

    def set(self, flat: Tensor) -> None:
        offset = 0
        with torch.no_grad():
            for p in self.objective.parameters:
                own = real(p)
                own.copy_(flat[offset : offset + own.numel()])
                offset += own.numel()


def theirs_of(objective: Objective, options: dict[str, Any]) -> Any:
    """Return torch's optimizer."""
    return torch.optim.LBFGS(objective.parameters, **options)


def real(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory as a vector of reals."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)


def check_memory(memory: Memory, theirs: dict[str, Any]) -> None:
    """Compare the memory with torch's state: kinds, dtypes and bits."""
    for key, value in theirs.items():
        own = getattr(memory, key)
        if isinstance(value, list):
            assert len(own) == len(value)
            for here, there in zip(own, value, strict=True):
                check_same(here, there)
        else:
            check_same(own, value)
    assert all(getattr(memory, key) is None for key in ("d", "al", "ro") if key not in theirs)


def check_same(here: Any, there: Any) -> None:
    """Compare two entries of a state."""
    assert type(here) is type(there) or {type(here), type(there)} == {int, float}
    if isinstance(there, Tensor):
        torch.testing.assert_close(here, there, rtol=0.0, atol=0.0, equal_nan=True)
    else:
        assert here == there or (here != here and there != there)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda each: "-".join(f"{k}={v}" for k, v in each.items()) or "defaults"
)
@pytest.mark.parametrize("make", OBJECTIVES, ids=lambda each: each.__name__)
def test_steps_equal_torch_bit_for_bit(
    make: Callable[[torch.dtype], Objective], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Losses, parameters, evaluations and memory are torch's after each of many steps, with each option."""
    here, there = make(dtype), make(dtype)
    ours, theirs = Machine(here, **options), theirs_of(there, options)
    for _ in range(STEPS):
        assert same_number(ours.step(), float(theirs.step(there.closure)))
        assert here.evaluations == there.evaluations
        for p, q in zip(here.parameters, there.parameters, strict=True):
            assert torch.equal(p.detach().nan_to_num(), q.detach().nan_to_num())
        check_memory(ours.memory, theirs.state[there.parameters[0]])


def same_number(here: float, there: float) -> bool:
    return here == there or (here != here and there != there)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_turn_that_is_repeated_leads_to_the_same_place(search: str | None) -> None:
    """Records are not changed by what follows from them: every turn is taken twice, and the steps are still torch's."""
    here, there = network(torch.float64), network(torch.float64)
    options: dict[str, Any] = {"line_search_fn": search, "lr": 0.5, "history_size": 2}
    theirs = theirs_of(there, options)
    machine = Machine(here, **options)
    for _ in range(5):
        turn: Turn | None = None
        while turn is None or turn.waiting is not None:
            loss, before = float(here.closure()), machine.flat()
            machine.advance(turn, loss)
            machine.set(before)
            turn = machine.advance(turn, loss)
        machine.memory = turn.memory
        theirs.step(there.closure)
    for p, q in zip(here.parameters, there.parameters, strict=True):
        assert torch.equal(p, q)
    check_memory(machine.memory, theirs.state[there.parameters[0]])


def test_a_step_that_is_given_up_leaves_the_memory_of_the_one_before() -> None:
    """A step that was begun and not ended has changed nothing that the next one begins with."""
    machine = Machine(rosenbrock(torch.float64), line_search_fn="strong_wolfe")
    machine.step()
    before = machine.memory
    kept = [each.clone() for each in before.tensors()]
    turn = machine.advance(None, float(machine.objective.closure()))
    assert turn.waiting is not None
    machine.advance(turn, float(machine.objective.closure()))
    assert machine.memory is before
    assert len(kept) > 5
    assert all(torch.equal(a, b) for a, b in zip(kept, before.tensors(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"max_eval": 0, "line_search_fn": "strong_wolfe"},
        {"history_size": 0},
        {"line_search_fn": "weak"},
    ],
    ids=lambda each: next(iter(each)),
)
def test_options_with_which_torch_fails_in_a_step_are_refused(options: dict[str, Any]) -> None:
    """They pass torch's constructor and fail in its step; here they are named."""
    there = rosenbrock(torch.float64)
    with pytest.raises((IndexError, UnboundLocalError, RuntimeError)):
        theirs_of(there, options).step(there.closure)
    with pytest.raises(InvalidOption) as refused:
        Machine(rosenbrock(torch.float64), **options).step()
    assert refused.value.field in options


@pytest.mark.parametrize("smaller", [1, 3, 6])
def test_a_smaller_history_grows_as_torchs_until_torch_fails(smaller: int) -> None:
    """The pairs that there are stay and more come, as in torch; where that is an IndexError the oldest pairs go."""
    here, there = quadratic(torch.float64), quadratic(torch.float64)
    options: dict[str, Any] = {"line_search_fn": "strong_wolfe", "max_iter": 1, "history_size": 8}
    machine, theirs = Machine(here, **options), theirs_of(there, options)
    failed = False
    for step in range(20):
        if step == 6:
            assert len(machine.memory.old_dirs or ()) == 5
            machine.hyper = LBFGSHyper.from_options({**options, "history_size": smaller})
            theirs.param_groups[0]["history_size"] = smaller
        machine.step()
        try:
            theirs.step(there.closure)
        except IndexError:
            failed = True
            break
        check_memory(machine.memory, theirs.state[there.parameters[0]])
        assert torch.equal(machine.flat(), torch.cat([real(p.detach()) for p in there.parameters]))
    assert failed == (smaller < 5)
    assert len(machine.memory.old_dirs or ()) == smaller


def test_a_search_that_ends_on_a_loss_that_is_nan_is_refused() -> None:
    """Where the slope is flat and the loss is NaN torch fails with an IndexError; here the loss is named."""
    objective = slope(torch.float64)
    machine = Machine(objective, line_search_fn="strong_wolfe")
    turn = machine.advance(None, float(objective.closure()))
    objective.closure()
    for p in objective.parameters:
        p.grad = torch.zeros_like(p)
    with pytest.raises(NonFinite, match="NaN"):
        machine.advance(turn, float("nan"))
