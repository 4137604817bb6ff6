"""Whoever holds a torch.optim.Optimizer can hold one of ours: signature, errors, steps, groups, schedules, state."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES, has, three_groups
from tests.support.client.twins import Twins, check_parameters, check_states, drawn, ours, parameters, theirs

# -- the class -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_ours_comes_after_torchs_arguments(name: str) -> None:
    """What is ours comes after torch's arguments, by keyword, in a class of torch's name."""
    own = getattr(farstep.optim, name)
    *_, last = inspect.signature(own.__init__).parameters.values()
    assert last.kind is inspect.Parameter.VAR_KEYWORD
    assert own.__name__ == name
    assert issubclass(own, torch.optim.Optimizer)


@pytest.mark.parametrize(
    "params", [[], [{"params": []}, {}], torch.ones(2), [torch.ones(2) * torch.ones(2, requires_grad=True)]]
)
def test_bad_parameters_give_torchs_own_error(params: Any) -> None:
    """No parameters, a tensor in place of a list, or one that is no leaf: type and words are torch's."""
    errors = []
    for kind in (ours("ASGD"), theirs("ASGD")):
        with pytest.raises(Exception, match=r".") as refused:
            kind(params)
        errors.append(refused.value)
    assert (type(errors[0]), str(errors[0])) == (type(errors[1]), str(errors[1]))


@pytest.mark.parametrize("name", [name for name in NAMES if has(name, "differentiable")])
def test_differentiable_is_refused_with_the_reason(name: str) -> None:
    """Autograd cannot run through a step on another machine, and the error says so and what to use."""
    with pytest.raises(InvalidOption, match=rf"autograd.*torch\.optim\.{name}") as refused:
        ours(name)(parameters(drawn(0)), differentiable=True)
    assert refused.value.field == "differentiable"


@pytest.mark.promise("An unknown optimizer option is refused by name, never ignored.", area="bad input")
def test_an_option_nobody_knows_is_a_type_error() -> None:
    """A misspelt keyword is refused as by any function."""
    with pytest.raises(TypeError, match="momentum"):
        ours("Adagrad")(parameters(drawn(0)), momentum=0.9)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_shown_as_torchs(name: str, place: RemoteOptions) -> None:
    """The repr shows the groups as torch's does."""
    twins = Twins(name, {"lr": 0.25}, place, grouping=three_groups)
    assert repr(twins.ours) == repr(twins.theirs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_subclass_is_the_optimizer_it_derives_from(dynamic: bool, place: RemoteOptions, talk: Conversation) -> None:
    """A subclass of the user's, or one made on the fly as Lightning makes them, trains as its base does."""

    class Mine(Adagrad):
        def step(self, closure: Any = None) -> Any:
            self.counted = getattr(self, "counted", 0) + 1
            return super().step(closure)

    kind = type("LightningAdagrad", (Adagrad,), {}) if dynamic else Mine
    here, there = parameters(drawn(0)), parameters(drawn(0))
    optimizer, reference = kind(here, lr=0.1, **place), theirs("Adagrad")(there, lr=0.1)
    for p, q, g in zip(here, there, drawn(1), strict=True):
        p.grad = q.grad = g
    optimizer.step()
    reference.step()
    check_parameters(here, there)
    if "server" in place:
        assert talk.control("GET", f"/v1/sessions/{optimizer.session}")["optimizer"] == "Adagrad"


def test_a_wrapper_that_borrows_class_and_attributes(place: RemoteOptions) -> None:
    """Lightning wraps an optimizer in an object of a class of both, which looks attributes up in the original."""

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__class__ = type("Lightning" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})
            self._optimizer = optimizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._optimizer, name)

        def step(self, closure: Any = None) -> Any:
            return self._optimizer.step(closure)

    twins = Twins("Adagrad", {}, place)
    wrapper: Any = Wrapper(twins.ours)
    assert isinstance(wrapper, torch.optim.Optimizer)
    twins.give(drawn(1))
    wrapper.step()
    twins.theirs.step()
    check_states(wrapper.state_dict(), twins.theirs.state_dict())
    wrapper.zero_grad()
    del wrapper
    gc.collect()
    twins.train(2, first=2)
    twins.check()


# -- steps -----------------------------------------------------------------------------------------------------------


def test_a_closure_runs_once_with_grad_enabled_and_its_loss_is_returned(place: RemoteOptions) -> None:
    """step(closure) evaluates it once, in a graph, and hands its value on; step() returns None."""
    (p,) = parameters(drawn(0, [(3,)]))
    optimizer: Any = Adagrad([p], **place)
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.pow(2).sum()
        torch.autograd.backward(loss)
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    assert loss.requires_grad
    assert calls == [True]
    with torch.no_grad():
        optimizer.step(closure=closure)
    assert calls == [True, True]
    assert optimizer.version == 2
    assert optimizer.step() is None


@pytest.mark.promise("Your gradients are read, and never written.", area="NaN, clipping and averages")
def test_gradients_are_never_changed(place: RemoteOptions) -> None:
    """Whatever the options, a gradient is the same tensor with the same values after the step."""
    here = parameters(drawn(0))
    optimizer = Adagrad(here, maximize=True, weight_decay=0.5, **place)
    gradients = drawn(1)
    for p, g in zip(here, gradients, strict=True):
        p.grad = g
    optimizer.step()
    for p, g, before in zip(here, gradients, drawn(1), strict=True):
        assert p.grad is g
        assert torch.equal(g, before)


def test_parameters_are_updated_in_place(place: RemoteOptions) -> None:
    """Storage and strides stay, and a backward pass through old values is refused instead of being wrong."""
    base = drawn(0, [(8, 6), (70_000,)])
    here = [base[0].t().requires_grad_(), base[1].requires_grad_()]
    before = [(p.data_ptr(), p.stride(), p._version) for p in here]
    optimizer = Adagrad(here, lr=0.1, **place)
    for p in here:
        stale = p.pow(3).sum()
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.grad = None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(stale)
    for p, (pointer, stride, version) in zip(here, before, strict=True):
        assert (p.data_ptr(), p.stride()) == (pointer, stride)
        assert p._version > version


def strided() -> list[Tensor]:
    """Return parameters whose memory is not simply one element after the other."""
    whole, part, wide = drawn(0, [(6, 5), (4, 4, 2), (5, 3, 4, 4)])
    tensors = [whole.t(), part[..., 0], wide.to(memory_format=torch.channels_last), torch.tensor(2.0)]
    return [tensor.requires_grad_() for tensor in tensors]


def negated() -> list[Tensor]:
    """Return a parameter that is shown as the negative of its memory."""
    return [torch.view_as_complex(drawn(1, [(4, 2)])[0]).conj().imag.requires_grad_()]


@pytest.mark.parametrize("make", [strided, negated])
def test_parameters_of_any_strides(make: Callable[[], list[Tensor]], place: RemoteOptions) -> None:
    """Transposed, sliced, channels-last, scalar, lazily negated: parameters are updated as torch's loop does."""
    here, there = make(), make()
    optimizer = Adagrad(here, lr=0.1, **place)
    reference = torch.optim.Adagrad(there, lr=0.1, foreach=False)
    for seed in range(1, 6):
        for p, q in zip(here, there, strict=True):
            (gradient,) = drawn(seed, [p.shape], p.dtype)
            p.grad, q.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    check_parameters(here, there)


def test_gradients_of_any_strides(place: RemoteOptions) -> None:
    """Transposed, expanded and lazily conjugated gradients mean what they show."""
    start = [*drawn(0, [(3, 4), (3, 4)]), *drawn(2, [(3, 4)], torch.complex64)]
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=start)
    gradients = [drawn(1, [(4, 3)])[0].t(), torch.ones(1).expand(3, 4), drawn(1, [(3, 4)], torch.complex64)[0].conj()]
    for p, q, g in zip(twins.here, twins.there, gradients, strict=True):
        p.grad, q.grad = g, g.clone()
    twins.ours.step()
    twins.theirs.step()
    twins.check(exact=False)


def test_a_step_without_any_gradient_changes_nothing(place: RemoteOptions) -> None:
    """All gradients missing: parameters and state stay, as in torch."""
    twins = Twins("Adamax", {}, place)
    twins.train(2)
    twins.step([None] * len(twins.here))
    twins.check()
    twins.train(2, first=3)
    twins.check()


def test_the_report_of_a_step(place: RemoteOptions) -> None:
    """last_step tells version, contributors, kernel, bytes and where the time went; at first it is None."""
    twins = Twins("Adagrad", {}, place)
    assert twins.ours.last_step is None
    twins.train(2)
    report = twins.ours.last_step
    assert report is not None
    assert (report.version, twins.ours.version, report.staleness, report.divisor) == (2, 2, 0, 1)
    assert (report.applied, report.duplicate, report.earlier, report.attempts) == (True, False, None, 1)
    assert report.contributors == (twins.ours.worker,)
    assert report.kernel == "reference"
    remote = "server" in place
    moved = sum(p.nbytes for p in twins.here) if remote else 0
    assert (report.bytes_sent, report.bytes_received) == (moved, moved)
    assert {"total", "kernel"} | ({"queue", "receive", "barrier", "send"} if remote else set()) <= set(report.seconds)
    assert all(0 <= seconds <= report.seconds["total"] for seconds in report.seconds.values())


# -- groups and schedules --------------------------------------------------------------------------------------------


def test_options_edited_in_groups_act_at_the_next_step(place: RemoteOptions) -> None:
    """param_groups may be edited at any time, also to values that torch's constructor would refuse."""
    twins = Twins("Adagrad", {}, place, grouping=three_groups)
    for seed, (index, key, value) in enumerate(
        [(0, "lr", 0.5), (2, "weight_decay", 0.3), (1, "maximize", True), (0, "lr", -0.01), (2, "eps", 1e-3)]
    ):
        twins.step(drawn(seed + 1))
        for optimizer in (twins.ours, twins.theirs):
            optimizer.param_groups[index][key] = value
    twins.train(2, first=10)
    twins.check()


def test_a_tensor_as_learning_rate(place: RemoteOptions) -> None:
    """A learning rate may be a tensor, and be filled anew between steps."""
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    here, there = parameters(drawn(0)), parameters(drawn(0))
    optimizer, reference = (
        Adagrad(here, lr=rates[0], foreach=False, **place),
        torch.optim.Adagrad(there, lr=rates[1], foreach=False),
    )
    for seed in range(1, 4):
        for p, q, g in zip(here, there, drawn(seed), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        reference.step()
        for rate in rates:
            rate.mul_(0.5)
    check_parameters(here, there)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=12, cycle_momentum="betas" in o.defaults),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_schedules_work_as_with_torch(name: str, schedule: str, place: RemoteOptions) -> None:
    """A scheduler takes our optimizer and gives the same rates, parameters and state as torch's."""
    twins = Twins(name, {"lr": 0.2}, place)
    schedules = [SCHEDULES[schedule](optimizer) for optimizer in (twins.ours, twins.theirs)]
    for seed in range(1, 11):
        twins.step(twins.drawn(seed))
        for each in schedules:
            each.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    twins.check()
