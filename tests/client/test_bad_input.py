"""What torch refuses is refused with torch's own exceptions, and nothing has changed then, here or on the server."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.conversation import Conversation
from farstep.errors import FarstepError, InvalidOption, TensorMismatch
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES, has
from tests.support.client.twins import Twins, check_equal, drawn, ours, parameters, theirs

NAN = float("nan")
VALUES: dict[str, list[Any]] = {
    "lr": [-1, -1e-9, NAN, torch.ones(2), torch.tensor(0.1), "fast", None],
    "eps": [-1, -1e-12, (None, -1), (-1, 1e-3)],
    "weight_decay": [-1, -1e-9],
    "lr_decay": [-1],
    "initial_accumulator_value": [-1],
    "rho": [-0.1, 1.1],
    "betas": [(1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (0.5, -0.1), (0, 0.5), (0.5, torch.tensor(0.5))],
    "momentum": [-1],
    "dampening": [0.5],
    "nesterov": [True],
    "momentum_decay": [-1],
    "alpha": [-1],
    "etas": [(1.0, 1.5), (0.5, 0.9), (0.0, 1.5)],
    "step_sizes": [(1.0, 0.1)],
    "beta2_decay": [0.5],
    "d": [0.5],
    "ns_steps": [-1, 100],
    "adjust_lr_fn": ["nonsense"],
    "line_search_fn": ["nonsense"],
    "max_iter": [-1],
}
"""For each option values of which torch refuses at least some, in some optimizer."""

TOGETHER: list[dict[str, Any]] = [
    {"fused": True, "foreach": True},
    {"fused": True, "capturable": True},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": torch.tensor(0.1), "foreach": True, "capturable": False},
    {"nesterov": True, "momentum": 0.5, "dampening": 0.5},
    {"nesterov": True, "momentum": 0.5},
    {"betas": (torch.tensor(0.5), torch.tensor(0.5)), "foreach": True},
    {"weight_decay": -1, "lr": -1},
]


def options_of(name: str) -> list[dict[str, Any]]:
    alone = [{option: value} for option, values in VALUES.items() for value in values]
    known = [each for each in (*alone, *TOGETHER) if all(has(name, option) for option in each)]
    return [*known, {"momentun": 0.5}]


CASES = [
    pytest.param(name, each, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in each.items())}".replace(" ", ""))
    for name in NAMES
    for each in options_of(name)
]


def outcome(made: Callable[[], object]) -> tuple[type[BaseException], str] | None:
    """Return the type and the words of what is raised, None if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.promise(
    "Options, states and gradients that torch refuses are refused in torch's type and words, and change nothing.",
    area="bad input",
)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_options_are_refused_as_by_torch(name: str, options: dict[str, Any], place: RemoteOptions) -> None:
    """The same options are refused and accepted, with the same type and words; but NaN is refused by all of ours."""
    theirs_said = outcome(lambda: theirs(name)(parameters(drawn(0)), **options))
    ours_said = outcome(lambda: ours(name)(parameters(drawn(0)), **options, **place))
    if theirs_said is None and options == {"lr": NAN}:
        assert ours_said is not None
        assert ours_said[0] is InvalidOption
        return
    assert ours_said == theirs_said


@pytest.fixture(params=NAMES)
def twins(request: pytest.FixtureRequest, place: RemoteOptions) -> Twins:
    """Return each optimizer and torch's, after two steps."""
    twins = Twins(request.param, {"momentum": 0.9} if request.param == "SGD" else {}, place)
    twins.train(2)
    return twins


@contextmanager
def nothing_changes(twins: Twins, talk: Conversation) -> Iterator[None]:
    """Check that version, parameters, groups and state stay as they are, in the session and here."""
    before, version, session = [p.detach().clone() for p in twins.here], twins.ours.version, twins.ours.session
    yield
    check_equal([p.detach() for p in twins.here], before)
    assert (twins.ours.version, twins.ours.session) == (version, session)
    report = twins.ours.last_step
    assert report is not None
    if report.bytes_sent:  # to a server, who is asked
        assert talk.control("GET", f"/v1/sessions/{session}")["version"] == version
    twins.check()
    twins.train(2, first=10)
    twins.check()


# -- states --------------------------------------------------------------------------------------------------------


def of_another_optimizer(given: dict[str, Any]) -> None:
    for own in given["state"].values():
        own["of_another"] = own.pop(next(iter(own)))


def of_another_shape(given: dict[str, Any]) -> None:
    own = given["state"][0]
    key = next(key for key, value in own.items() if isinstance(value, torch.Tensor) and value.dim())
    own[key] = torch.ones(3, 3)


def of_fewer_parameters(given: dict[str, Any]) -> None:
    given["param_groups"][0]["params"].pop()


def of_more_parameters(given: dict[str, Any]) -> None:
    given["param_groups"][0]["params"].append(99)


def of_more_groups(given: dict[str, Any]) -> None:
    given["param_groups"].append({**given["param_groups"][0], "params": []})


@pytest.mark.promise(
    "Options, states and gradients that torch refuses are refused in torch's type and words, and change nothing.",
    area="bad input",
)
@pytest.mark.parametrize(
    "spoil",
    [of_another_optimizer, of_another_shape, of_fewer_parameters, of_more_parameters, of_more_groups],
    ids=lambda each: each.__name__,
)
def test_a_state_that_does_not_fit_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], twins: Twins, talk: Conversation
) -> None:
    """Of another optimizer, shape or count: a ValueError, torch's own where torch looks at all."""
    given = copy.deepcopy(twins.ours.state_dict())
    spoil(given)
    if spoil is of_another_optimizer and type(twins.theirs) in (torch.optim.SGD, torch.optim.Muon):
        given["state"][0] = {"momentum_buffer": "a word"}  # else all of its state is optional
    with nothing_changes(twins, talk):
        said = outcome(lambda: twins.ours.load_state_dict(given))
        assert said is not None
        if spoil in (of_another_optimizer, of_another_shape) and said[0] is ValueError:
            return  # which torch finds out in a step, if at all
        assert said == outcome(lambda: copy.deepcopy(twins.theirs).load_state_dict(given))


def test_what_is_no_state_dict_is_refused_as_by_torch(twins: Twins, talk: Conversation) -> None:
    """Without groups or state, or no dict at all: type and words are torch's."""
    whole = copy.deepcopy(twins.theirs.state_dict())
    with nothing_changes(twins, talk):
        parts: list[Any] = [{}, {"state": {}}, {"param_groups": whole["param_groups"]}, None, 3]
        for part in parts:
            said = [outcome(partial(each.load_state_dict, part)) for each in (twins.ours, twins.theirs)]
            assert said[0] == said[1] is not None


# -- groups --------------------------------------------------------------------------------------------------------


def test_groups_that_cannot_be_are_refused_as_by_torch(twins: Twins, talk: Conversation) -> None:
    """A parameter that is in another group, a set, no tensor, no leaf, some names only, no dict."""
    (fresh,) = parameters(drawn(5, [(3,)]))
    makers: list[Callable[[list[Tensor]], Any]] = [
        lambda ps: {"params": [fresh, ps[0]]},
        lambda ps: {"params": {fresh}},
        lambda ps: {"params": [3]},
        lambda ps: {"params": [fresh * 2]},
        lambda ps: {"params": [("name", fresh)]},
        lambda ps: {"params": [("name", fresh), fresh]},
        lambda ps: [fresh],
    ]
    with nothing_changes(twins, talk):
        for made in makers:
            said = [
                outcome(partial(each.add_param_group, made(ps)))
                for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there))
            ]
            assert said[0] == said[1] is not None


BAD_PARAMETERS: list[Callable[[], Any]] = [
    list,
    lambda: [{"params": []}, {}],
    lambda: torch.ones(2),
    lambda: [3],
    lambda: ["weights"],
    lambda: [torch.ones(2, requires_grad=True) * 2],
    lambda: [("a", torch.ones(2)), torch.ones(2)],
    lambda: [{"params": [("a", torch.ones(2))]}, {"params": [torch.ones(3)]}],
    lambda: [{"params": [p := torch.ones(2)]}, {"params": [p]}],
    lambda: [{"lr": 1}],
    lambda: 3,
]


@pytest.mark.parametrize("made", BAD_PARAMETERS)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_cannot_be_are_refused_as_by_torch(
    name: str, made: Callable[[], Any], place: RemoteOptions
) -> None:
    """None, no list, no tensors, no leaves, twice in groups, some with names: type and words are torch's."""
    said = outcome(lambda: ours(name)(made(), **place))
    assert said == outcome(lambda: theirs(name)(made()))
    assert said is not None


def test_a_parameter_twice_in_a_group_is_refused(place: RemoteOptions) -> None:
    """Torch warns that it will be an error; a session would have two versions of it."""
    (p,) = parameters(drawn(0, [(3,)]))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(TensorMismatch, match="more than once"),
    ):
        Adagrad([p, p], **place)


def test_a_parameter_whose_elements_share_memory_is_refused(place: RemoteOptions) -> None:
    """Torch refuses to step on an expanded tensor; ours refuses to begin."""
    p = torch.zeros(1).expand(4).detach().requires_grad_()
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.optim.Adagrad([p], foreach=False).step()
    with pytest.raises(TensorMismatch, match="share memory"):
        Adagrad([p], **place)


# -- gradients -----------------------------------------------------------------------------------------------------


WITH_OPTIONS = [
    pytest.param(name, options, id=f"{name}-{'-'.join(options) or 'defaults'}")
    for name in NAMES
    for options in ({}, {"weight_decay": 0.1}, {"maximize": True})
    if all(has(name, option) for option in options)
]


@pytest.mark.promise(
    "Options, states and gradients that torch refuses are refused in torch's type and words, and change nothing.",
    area="bad input",
)
@pytest.mark.parametrize("kind", ["sparse", "complex", "sparse complex", "one sparse of two"])
@pytest.mark.parametrize(("name", "options"), WITH_OPTIONS)
def test_gradients_are_refused_where_torch_refuses_them(
    name: str, kind: str, options: dict[str, Any], place: RemoteOptions, talk: Conversation
) -> None:
    """Sparse or complex: refused with torch's exception, and nothing has changed, or taken as torch takes them."""
    dtype = torch.complex64 if "complex" in kind else torch.float32
    start = drawn(0, [(6, 4), (3, 3)], dtype)
    if refused := outcome(lambda: theirs(name)(parameters(start), **options)):
        assert outcome(lambda: ours(name)(parameters(start), **options, **place)) == refused
        return
    twins = Twins(name, options, place, start=start)
    gradients = drawn(1, [(6, 4), (3, 3)], dtype)
    if "sparse" in kind:
        gradients[0] = gradients[0].to_sparse(1)
    if kind.startswith("sparse"):
        gradients[1] = gradients[1].to_sparse(1)
    twins.give(gradients)
    before = [p.detach().clone() for p in twins.here]
    theirs_said, ours_said = outcome(twins.theirs.step), outcome(twins.ours.step)
    assert ours_said == theirs_said
    if theirs_said is None:
        twins.check(exact=False)
        return
    assert twins.ours.version == 0
    check_equal([p.detach() for p in twins.here], before)
    assert len(twins.ours.state) == (2 if name == "Adagrad" else 0)
    error = raised(twins.ours.step)
    assert isinstance(error.__cause__, FarstepError)
    for p, g in zip(twins.here, twins.drawn(2), strict=True):
        p.grad = g
    if "complex" not in kind:
        twins.ours.step()
        assert twins.ours.version == 1


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception, match=r".") as refused:
        call()
    return refused.value
