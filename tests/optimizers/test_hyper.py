"""The options of the rules: torch's names, defaults and refusals."""

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch

from farstep.errors import InvalidOption
from farstep.protocol.hyper import CommonHyper
from farstep_service.optimizers import RULES

NAMES = list(RULES)


def torch_defaults(name: str) -> dict[str, Any]:
    """Return torch's options and their defaults."""
    optimizer = getattr(torch.optim, name)
    parameters = inspect.signature(optimizer).parameters
    its = {option: each.default for option, each in parameters.items() if option != "params"}
    assert optimizer([torch.zeros(1, 1)]).defaults.items() >= its.items()
    return its


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_torch_is_known(name: str):
    """Each rule has exactly torch's options, with torch's defaults."""
    inherited = {"decoupled_weight_decay": True} if name == "AdamW" else {}  # which its constructor does not take
    assert RULES[name].hyper().to_options() == torch_defaults(name) | inherited


BAD: dict[str, list[Any]] = {
    "lr": [-1, -0.5, math.nan],
    "lr_decay": [-1],
    "weight_decay": [-1, -1e-9, math.nan],
    "initial_accumulator_value": [-2],
    "eps": [-1],
    "beta2_decay": [0.1],
    "d": [0.9],
    "adjust_lr_fn": ["best"],
    "rho": [-0.1, 1.1, 2],
    "betas": [(-0.1, 0.9), (0.9, 1.0), (1.5, 0.9), (0.5, -1)],
    "momentum": [-0.1],
    "alpha": [-0.5],
    "momentum_decay": [-1],
    "etas": [(0.0, 1.2), (0.5, 1.0), (1.1, 1.2)],
}


UNCHECKED = {("ASGD", "alpha"), ("Muon", "eps")}
"""Options that torch takes as they are."""


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        (name, option, value)
        for name in NAMES
        for option, values in BAD.items()
        if option in torch_defaults(name) and (name, option) not in UNCHECKED
        for value in ([(-1, 0), (None, -1)] if (name, option) == ("Adafactor", "eps") else values)
        if name != "SGD" or value == value  # where torch takes NaN, we say that it is not finite
    ],
)
def test_values_out_of_range_are_refused_in_torchs_words(name: str, option: str, value: Any):
    """A value that torch's constructor refuses is refused with the same sentence, naming the option."""
    with pytest.raises(ValueError, match=r"nvalid|should be|not supported") as theirs:
        getattr(torch.optim, name)([torch.zeros(1, 1)], **{option: value})
    with pytest.raises(InvalidOption) as ours:
        RULES[name].hyper.from_options({option: value})
    assert ours.value.detail == str(theirs.value)
    assert ours.value.field == option


@pytest.mark.parametrize("name", NAMES)
def test_the_first_of_several_bad_values_is_torchs_first(name: str):
    """With everything out of range, torch and the record complain about the same option."""
    bad = {option: value for option, (value, *_) in BAD.items() if option in torch_defaults(name)}
    bad |= {"eps": (-1, -1)} if name == "Adafactor" else {}
    with pytest.raises(ValueError, match=r"nvalid|should be|not supported") as theirs:
        getattr(torch.optim, name)([torch.zeros(1, 1)], **bad)
    with pytest.raises(InvalidOption) as ours:
        RULES[name].hyper.from_options(bad)
    assert ours.value.detail == str(theirs.value)


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        *((name, {"fused": True, "foreach": True}, "fused") for name in ("Adagrad", "SGD", "Adam", "AdamW")),
        ("SGD", {"nesterov": True}, "nesterov"),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        ("Adam", {"betas": (0, 0.9)}, "betas"),
        ("AdamW", {"betas": (0.5, 0)}, "betas"),
    ],
)
def test_options_that_exclude_each_other(name: str, options: dict[str, Any], field: str):
    """What torch does not take together is refused in torch's words, `fused` with `foreach` too."""
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        getattr(torch.optim, name)([torch.zeros(1, 1)], **options)
    with pytest.raises(InvalidOption) as ours:
        RULES[name].hyper.from_options(options)
    assert ours.value.detail == str(theirs.value)
    assert ours.value.field == field


@pytest.mark.promise("An unknown optimizer option is refused by name, never ignored.", area="bad input")
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_named(name: str):
    """An option nobody knows is an error that names it and those that exist."""
    with pytest.raises(InvalidOption, match="has no option 'speed'") as caught:
        RULES[name].hyper.from_options({"lr": 0.1, "speed": 0.9})
    assert caught.value.field == "speed"
    assert "lr" in caught.value.remedy


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("lr", True, "a number"),
        ("lr", "0.1", "a number"),
        ("lr", None, "a number"),
        ("lr", [0.1], "a number"),
        ("betas", 0.9, "a list of 2 numbers"),
        ("betas", [0.9], "a list of 2 numbers"),
        ("betas", [0.9, True], "a list of 2 numbers"),
        ("maximize", 1, "true or false"),
        ("foreach", "yes", "true or false or None"),
    ],
)
def test_wrong_types_are_refused(option: str, value: Any, words: str):
    """A value of another type is refused, saying what would be right; a truth value is no number."""
    with pytest.raises(InvalidOption, match=f"Adamax: {option}=.* is not {words}"):
        RULES["Adamax"].hyper.from_options({option: value})


@pytest.mark.parametrize("value", [math.inf, 10**400])
def test_numbers_without_end_are_refused(value: float):
    """Infinity, and integers beyond every float, are refused."""
    with pytest.raises(InvalidOption, match="not finite"):
        RULES["ASGD"].hyper.from_options({"t0": value})


@pytest.mark.parametrize("name", [name for name in NAMES if "differentiable" in torch_defaults(name)])
def test_a_differentiable_step_is_refused_with_the_reason(name: str):
    """`differentiable=True` cannot work through a server, and the error says why."""
    with pytest.raises(InvalidOption, match="autograd cannot reach"):
        RULES[name].hyper.from_options({"differentiable": True})


def test_options_survive_the_wire():
    """Options that were written out and read again, lists in the place of tuples, are equal."""
    hyper = RULES["Adamax"].hyper(lr=1, betas=(0.5, 0.25), foreach=True, capturable=True)
    options = hyper.to_options() | {"betas": [0.5, 0.25]}
    assert RULES["Adamax"].hyper.from_options(options) == hyper


def test_edited_options_are_taken_as_torch_takes_them():
    """A value that a scheduler puts into a group later is not checked for its range, but for its type."""
    assert RULES["Adagrad"].hyper.from_options({"lr": -1e-19}, edited=True).to_options()["lr"] == -1e-19
    with pytest.raises(InvalidOption, match="not finite"):
        RULES["Adagrad"].hyper.from_options({"lr": math.nan}, edited=True)


def test_options_are_frozen():
    """Options cannot be changed behind the back of a session."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        CommonHyper().maximize = True  # type: ignore[misc]
