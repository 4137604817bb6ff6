"""An optimizer or an option that a newer torch adds is a failing test, not silence."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

import farstep
from tests.parity.cases import NAMES, Case, cases, parameters_of, skipped, trained
from tests.parity.completeness import (
    ABSENT,
    is_current,
    missing_optimizers,
    missing_options,
    optimizers_of,
    uncovered_options,
)
from tests.parity.options import SKIPPED, TOGETHER

CURRENT = is_current(torch.__version__)


@pytest.mark.promise(
    "farstep has every optimizer and every option of torch, with torch's defaults, or a reason why not.",
    area="bits of torch",
)
def test_every_optimizer_of_torch_is_here_or_absent_for_a_reason():
    """Torch's optimizers are farstep's, but for those that `ABSENT` names, none of which farstep has."""
    assert missing_optimizers(optimizers_of(torch.optim), farstep.optim.__all__, ABSENT) == []
    assert all(ABSENT.values())


@pytest.mark.promise(
    "farstep has every optimizer and every option of torch, with torch's defaults, or a reason why not.",
    area="bits of torch",
)
@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_torch_is_here(name: str):
    """Names, kinds, defaults and order of the arguments are torch's."""
    assert missing_options(vars(torch.optim)[name], vars(farstep.optim)[name], current=CURRENT) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_case(name: str):
    """Each option is set to something else than its default in some case that trains, or is skipped for a reason."""
    assert uncovered_options(vars(torch.optim)[name], trained(name), SKIPPED) == []


def test_no_case_is_there_twice():
    """Optimizer, options and way name a case."""
    named = [(case.name, case.label) for case in cases()]
    assert sorted({each for each in named if named.count(each) > 1}) == []


def test_everything_skipped_says_why():
    """A row without a comparison has its reason beside it, and each of torch's differentiable optimizers has one."""
    assert all(each.reason for each in skipped())
    differentiable = {name for name in NAMES if "differentiable" in parameters_of(vars(torch.optim)[name])}
    assert {each.name for each in skipped() if each.label == "differentiable=True"} == differentiable


def test_no_row_of_options_is_forgotten():
    """The table has options that act on each other for every optimizer, and for none that farstep does not have."""
    assert set(TOGETHER) == set(NAMES) - set(ABSENT)


# -- the test of the test ---------------------------------------------------------------------------------------------


class Newer(torch.optim.SGD):
    """What a newer torch might bring: one more option."""

    def __init__(self, params: list[Tensor], lr: float = 1e-3, momentum: float = 0, *, friction: float = 0.5) -> None:
        super().__init__(params, lr, momentum)


class Ours:
    def __init__(self, params: list[Tensor], lr: float = 1e-3, momentum: float = 0, **remote: object) -> None: ...


class Reordered:
    def __init__(self, params: list[Tensor], momentum: float = 0, lr: float = 1e-3, **remote: object) -> None: ...


class Otherwise:
    def __init__(
        self, params: list[Tensor], lr: float = 1e-2, *, momentum: float = 0, friction: float = 0.5, **remote: object
    ) -> None: ...


class Further:
    def __init__(
        self,
        params: list[Tensor],
        lr: float = 1e-3,
        momentum: float = 0,
        *,
        friction: float = 0.5,
        wax: bool = False,
        **remote: object,
    ) -> None: ...


def test_a_new_optimizer_is_reported():
    """A class that torch adds is named, and one that farstep has gained may not be called absent any more."""
    module = ModuleType("torch.optim")
    vars(module).update(SGD=torch.optim.SGD, Newer=Newer, Optimizer=torch.optim.Optimizer, lr_scheduler=torch.optim)
    assert missing_optimizers(optimizers_of(module), ["SGD"], {}) == ["torch has Newer, farstep has not"]
    assert missing_optimizers(optimizers_of(module), ["SGD"], {"Newer": "not yet"}) == []
    (said,) = missing_optimizers(["SGD", "Newer"], ["SGD", "Newer"], {"Newer": "not yet"})
    assert said == "farstep has Newer, which is said to be absent: not yet"


def test_a_new_option_is_reported():
    """An option that torch adds is named where farstep lacks it, and where the table of cases does."""
    (said,) = missing_options(Newer, Ours, current=True)
    assert said == "Newer of torch takes friction=0.5, farstep's does not"
    table = [Case("Newer", {"lr": 0.1, "momentum": 0.9}), Case("SGD", {"friction": 0.1})]
    assert uncovered_options(Newer, table, {}) == ["Newer takes friction, and no case sets it"]
    assert uncovered_options(Newer, [*table, Case("Newer", {"friction": 0.5})], {}) != []
    assert uncovered_options(Newer, [*table, Case("Newer", {"friction": 0.1})], {}) == []
    assert uncovered_options(Newer, table, {"friction": "why"}) == []


def test_another_default_kind_or_place_is_reported():
    """A default or a kind that torch changes is named, and so is another order."""
    assert missing_options(Newer, Otherwise, current=True) == [
        "Newer of torch takes lr=0.001 positional or keyword, farstep's lr=0.01 positional or keyword",
        "Newer of torch takes momentum=0 positional or keyword, farstep's momentum=0 keyword-only",
    ]
    assert len(missing_options(Newer, Reordered, current=False)) == 2


def test_what_an_older_torch_lacks_is_no_fault():
    """An option that farstep has and an older torch lacks is passed over there, and reported with a current one."""
    assert missing_options(Newer, Further, current=False) == []
    assert missing_options(Newer, Further, current=True) == ["Newer of farstep takes wax, torch's does not"]
    assert [is_current(each) for each in ("2.11.0", "2.13.0+cpu", "2.14.1", "3.0.0a0")] == [False, True, True, True]
