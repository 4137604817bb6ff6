"""Options that are not Python's own numbers: torch's bits, torch's refusals, and the user's objects in the groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from enum import IntEnum, StrEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import farstep
from farstep.errors import InvalidOption
from farstep.identity import Worker
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync, to_options
from farstep.protocol.policies import Policies as SessionPolicies
from farstep.settings import RemoteOptions, resolve
from tests.support.client.twins import Twins, check_parameters, drawn, one_group, ours, parameters, plain, theirs


class Float(float):
    """A subclass of float, as configuration libraries make them."""


class Choice(IntEnum):
    ONE = 1
    TWO = 2


class Policies(StrEnum):
    SKIP = "skip"


class ListConfig(Sequence[Any]):
    """A sequence that is neither list nor tuple, as OmegaConf has them."""

    def __init__(self, *items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


TAKEN: list[tuple[str, str, Any]] = [
    *((name, "lr", np.float64(0.1)) for name in ("SGD", "Adam", "Adagrad", "ASGD", "Rprop", "Muon", "RAdam")),
    *((name, "lr", np.array(0.1)) for name in ("SGD", "Adam", "Adadelta", "Adafactor")),
    *((name, "lr", np.int64(1)) for name in ("SGD", "Adam", "LBFGS")),
    *((name, "lr", True) for name in ("SGD", "Adamax")),
    ("Adam", "lr", np.bool_(True)),
    *((name, "lr", np.float32(0.1)) for name in ("SGD", "Adadelta", "RMSprop", "LBFGS")),
    *((name, "lr", torch.tensor(0.1)) for name in ("SGD", "RMSprop")),
    *((name, "lr", Fraction(1, 10)) for name in ("Adam", "AdamW", "Adagrad", "Muon")),
    *((name, "lr", Float(0.1)) for name in ("SGD", "NAdam")),
    *((name, "lr", Choice.ONE) for name in ("SGD", "Adam")),
    ("SGD", "momentum", np.float32(0.9)),
    ("SGD", "weight_decay", torch.tensor(0.05)),
    ("SGD", "nesterov", 0),
    ("Adam", "amsgrad", 1),
    ("Adam", "amsgrad", np.bool_(True)),
    ("Adam", "maximize", torch.tensor(True)),
    ("Adam", "eps", np.float32(1e-3)),
    ("Adam", "betas", ListConfig(0.7, 0.9)),
    ("Adam", "betas", np.array([0.7, 0.9])),
    ("Adam", "betas", [np.float64(0.7), Float(0.9)]),
    ("Adamax", "betas", ListConfig(0.7, np.float64(0.9))),
    ("Rprop", "etas", np.array([0.3, 1.5])),
    ("Adafactor", "eps", ListConfig(None, np.float64(1e-3))),
    ("Muon", "ns_coefficients", ListConfig(3.0, -4.0, 2.0)),
    ("LBFGS", "max_iter", 3.0),
    ("LBFGS", "max_iter", np.int32(3)),
    ("LBFGS", "history_size", Choice.TWO),
    ("LBFGS", "line_search_fn", np.str_("strong_wolfe")),
]
"""Values that torch's classes train with, and that mean to them what the float64 number means."""

REFUSED: list[tuple[str, str, Any]] = [
    ("SGD", "lr", Fraction(1, 10)),
    ("SGD", "lr", Decimal("0.1")),
    ("SGD", "lr", np.array([0.1])),
    ("SGD", "momentum", np.array(0.9)),
    ("SGD", "weight_decay", True),
    ("SGD", "lr", np.bool_(True)),
    ("Adam", "lr", Decimal("0.1")),
    ("Adam", "eps", Fraction(1, 1000)),
    ("Adamax", "betas", (Fraction(1, 2), Fraction(1, 2))),
    ("Rprop", "etas", (np.float32(0.5), np.float32(1.5))),
    ("RAdam", "weight_decay", Decimal("0.1")),
    ("LBFGS", "lr", Fraction(1, 10)),
]
"""Values that torch's classes take at construction and fail on in a step."""


def any_(**options: Any) -> dict[str, Any]:
    """Return options whose types are the test's subject."""
    return options


def named(cases: list[tuple[str, str, Any]]) -> list[Any]:
    return [
        pytest.param(*case, id=f"{index}-{case[0]}-{case[1]}-{type(case[2]).__name__}")
        for index, case in enumerate(cases)
    ]


def train(twins: Twins, steps: int, *, first: int = 1) -> None:
    """Take steps; LBFGS along gradients that a closure has."""
    if twins.name != "LBFGS":
        twins.train(steps, first=first)
        return
    for _ in range(steps):
        for optimizer, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):

            def closure(optimizer: Any = optimizer, ps: Any = ps) -> Any:
                optimizer.zero_grad()
                loss = sum(((p - 1) ** 4).sum() for p in ps)
                loss.backward()
                return loss

            optimizer.step(closure)


@pytest.mark.parametrize("where", ["constructor", "group", "between steps", "checkpoint"])
@pytest.mark.parametrize(("name", "option", "value"), named(TAKEN))
def test_what_torch_takes_gives_torchs_bits(
    name: str, option: str, value: Any, where: str, one_thread: None, place: RemoteOptions
) -> None:
    """A value of any type that torch trains with is trained with, wherever it comes in, and stays in the group."""
    if option in ("amsgrad", "history_size") and (where in ("between steps", "checkpoint") or name == "LBFGS"):
        where = "constructor"  # what torch's classes cannot take up after their first step
    together = {"momentum": 0.9} if name == "SGD" and option != "momentum" else {}
    if where == "constructor":
        twins = Twins(name, {**together, option: value}, place)
    elif where == "group" and name != "LBFGS":
        twins = Twins(name, together, place, grouping=lambda ps: [{"params": ps, option: value}])
    else:
        twins = Twins(name, together, place)
        train(twins, 1)
        for each in (twins.ours, twins.theirs):
            if where == "checkpoint":
                saved = each.state_dict()
                saved["param_groups"][0][option] = value
                each.load_state_dict(saved)
            else:
                each.param_groups[0][option] = value
    train(twins, 3, first=2)
    check_parameters(twins.here, twins.there)
    here, there = (each.param_groups[0][option] for each in (twins.ours, twins.theirs))
    assert type(here) is type(there)
    assert (here is value) == (there is value)


def failure_of(optimizer: torch.optim.Optimizer) -> Exception:
    """Return what a step raises, or the one after it: torch's SGD looks at its momentum in the second."""
    try:
        for _ in range(2):
            optimizer.step(lambda: 1.0)
    except (TypeError, RuntimeError) as error:
        return error
    raise AssertionError("two steps were taken")


@pytest.mark.parametrize(("name", "option", "value"), named(REFUSED))
def test_what_torch_fails_on_is_refused_alike(name: str, option: str, value: Any, place: RemoteOptions) -> None:
    """A value that torch's step fails on is refused by the same kind of error, which names it; nothing has changed."""
    twins = Twins(name, {option: value}, place)
    errors = []
    for each in (twins.ours, twins.theirs):
        twins.give(twins.drawn(1))
        errors.append(failure_of(each))
    assert isinstance(errors[0], type(errors[1]))
    assert f"torch.optim.{name} does not take {option}=" in str(errors[0])
    assert twins.ours.version == 0
    twins.ours.param_groups[0][option] = theirs(name)(parameters(drawn(0))).defaults[option]
    twins.give(twins.drawn(1))
    twins.ours.step(lambda: 1.0)
    assert twins.ours.version > 0


def test_a_schedule_in_numpy(place: RemoteOptions) -> None:
    """A cosine in numpy, by hand and as a LambdaLR, trains as torch does, and the group shows what it was given."""
    twins = Twins("Adam", {"lr": 0.05}, place)
    schedules = [LambdaLR(each, lambda step: 0.5 * (1 + np.cos(step))) for each in (twins.ours, twins.theirs)]
    for step in range(4):
        twins.train(1, first=step)
        for schedule in schedules:
            schedule.step()
    for step in range(3):
        for each in (twins.ours, twins.theirs):
            each.param_groups[0]["lr"] = 0.05 * (1 + np.cos(step))
        twins.train(1, first=10 + step)
    assert type(twins.ours.param_groups[0]["lr"]) is np.float64
    twins.check()


def test_an_array_that_is_changed_in_place_counts(place: RemoteOptions) -> None:
    """What is written into an array or a tensor that is the rate holds from the next step on, as with torch."""
    rate = np.array(0.1)
    twins = Twins("SGD", {"lr": rate}, place)
    twins.train(1)
    rate[...] = 0.025
    twins.train(2, first=2)
    check_parameters(twins.here, twins.there)


@pytest.mark.parametrize("value", [np.float32(0.1), np.float16(0.1), torch.tensor(0.1), torch.tensor([0.1])])
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "NAdam"])
def test_a_narrow_number_counts_as_exactly_its_value(name: str, value: Any, place: RemoteOptions) -> None:
    """A float32 or float16 number is the float of its value: the bits are those of torch with that float."""
    here, there = parameters(drawn(0)), parameters(drawn(0))
    mine = ours(name)(one_group(here), **plain(name, {"lr": value}), **place)
    other = theirs(name)(one_group(there), **plain(name, {"lr": float(value.item())}))
    for seed in range(3):
        for each, ps in ((mine, here), (other, there)):
            for p, gradient in zip(ps, drawn(seed), strict=True):
                p.grad = gradient
            each.step()
    check_parameters(here, there)


@pytest.mark.parametrize("value", ["0.1", 1j, object()])
def test_what_is_no_number_is_refused_by_name(value: Any, place: RemoteOptions) -> None:
    """A value that no number can be made of is refused, naming the option, and the optimizer goes on without it."""
    twins = Twins("SGD", {}, place)
    twins.train(1)
    twins.ours.param_groups[0]["dampening"] = value
    with pytest.raises((TypeError, RuntimeError, InvalidOption), match="dampening"):
        twins.ours.step()
    twins.ours.param_groups[0]["dampening"] = 0
    twins.train(1, first=2)
    twins.check()


# -- farstep's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "same"),
    [
        (lambda: Sync(**any_(workers=np.int64(3), quorum=Choice.TWO)), Sync(workers=3, quorum=2)),
        (lambda: Sync(**any_(workers=torch.tensor(2), deadline_s=np.float64(5))), Sync(workers=2, deadline_s=5.0)),
        (lambda: Sync(**any_(workers=np.str_("live"), lease_s=Fraction(5, 2))), Sync(workers="live", lease_s=2.5)),
        (
            lambda: Bounded(**any_(staleness=np.int32(4), deadline_s=np.float32(0.5))),
            Bounded(staleness=4, deadline_s=0.5),
        ),
        (lambda: Async(**any_(delay_compensation=np.float64(0.04))), Async(delay_compensation=0.04)),
    ],
)
def test_modes_take_numbers_of_any_type(made: Callable[[], Consistency], same: Consistency) -> None:
    """A mode made of numbers of other types is the one that is made of Python's, and travels as it."""
    mode = made()
    assert mode == same
    assert json.dumps(to_options(mode)) == json.dumps(to_options(same))


def test_policies_and_places_take_numbers_of_any_type() -> None:
    """What is farstep's own is Python's own from the moment they come in, whatever they were."""
    given = {
        "clip_norm": np.float32(0.5),
        "clip_value": Fraction(1, 2),
        "accumulate": np.int64(2),
        "ema": Decimal("0.5"),
    }
    policies = SessionPolicies.of(given)
    plain = SessionPolicies.of({"clip_norm": 0.5, "clip_value": 0.5, "accumulate": 2, "ema": 0.5})
    assert policies == plain
    assert json.dumps(policies.to_options()) == json.dumps(plain.to_options())
    said: Any = {
        "server": np.str_("http://box:1"),
        "nonfinite": Policies.SKIP,
        "timeout_s": Fraction(5, 2),
        "overlap": np.bool_(True),
        "clip_norm": torch.tensor(0.5),
    }
    place = resolve(said, {})
    found = (place.server, place.nonfinite, place.timeout_s, place.overlap, place.policies.options()["clip_norm"])
    assert found == ("http://box:1", "skip", 2.5, True, 0.5)
    assert list(map(type, found)) == [str, str, float, bool, float]
    me = farstep.worker(rank=np.int64(1), count=np.int32(2))  # type: ignore[arg-type]
    assert (me.rank, me.count, me.name) == (1, 2, "w1")
    assert type(me.rank) is int
    assert isinstance(me, Worker)


@pytest.mark.parametrize("value", [True, "2", 2.5, 1j, np.array([1, 2])])
def test_what_is_no_count_of_workers_is_refused_by_name(value: Any) -> None:
    """What is no whole number is refused as ever, and named."""
    with pytest.raises(InvalidOption, match="workers"):
        Sync(workers=value)


def test_policies_of_other_types_act_on_a_server(place: RemoteOptions) -> None:
    """Clipping and averaging asked for in numpy are done, with the numbers of Python's."""
    here, there = parameters(drawn(0)), parameters(drawn(0))
    for ps, options in ((here, {"clip_norm": np.float64(0.3), "ema": np.float64(0.9)}), (there, {"clip_norm": 0.3})):
        mine = ours("SGD")(ps, lr=0.1, **place, **options)
        for p, gradient in zip(ps, drawn(3), strict=True):
            p.grad = gradient
        mine.step()
    check_parameters(here, there)


def test_rounds_take_a_count_of_any_type() -> None:
    """`every` may be a number of numpy's."""
    model = torch.nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with farstep.LocalSGD(model, inner, every=np.int64(2)) as rounds:  # type: ignore[arg-type]
        for _ in range(4):
            model(torch.ones(3, 2)).sum().backward()
            inner.step()
    assert rounds.version == 2
    assert type(rounds.every) is int
