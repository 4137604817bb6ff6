"""Rounds of models and inner optimizers as people have them: subclassed, wrapped, compiled, unfrozen, replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import farstep
from farstep.errors import InvalidOption
from farstep.optim.names import named_parameters, plain_names
from farstep.settings import RemoteOptions
from tests.support.client.rounds import Open, Simulation, Worker, diloco, local_sgd, model_of, parameters_of
from tests.support.client.twins import check_parameters, drawn, ours

# -- what counts as a step -------------------------------------------------------------------------------------------


class Logged(torch.optim.AdamW):
    """A class of a user's, whose step has the step of its base within it."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.inside = False
        self.fails = False

    def step(self, closure: Any = None) -> Any:
        self.inside = True
        try:
            loss = super().step(closure)
            if self.fails:
                raise ZeroDivisionError
            return loss
        finally:
            self.inside = False


class Twice(Logged):
    """A class whose step has two steps within it, each of them with another within it."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step()


def rounds_of(make: Open, kind: Callable[..., torch.optim.Optimizer], every: int) -> tuple[Any, Any, nn.Module]:
    """Return rounds without a server, with an inner optimizer of a class, and the model."""
    torch.optim.AdamW([torch.zeros(1)])  # whose step has hooks of its own from then on
    model = model_of()
    inner = kind(model.parameters(), lr=0.01)
    return make(model, inner, {"kernel": "reference"}, every), inner, model


def step(inner: Any, model: nn.Module, *, closure: bool = False) -> None:
    for p, gradient in zip(parameters_of(model), drawn(7, [p.shape for p in parameters_of(model)]), strict=True):
        p.grad = gradient
    if closure:
        inner.step(lambda: 1.0)
    else:
        inner.step()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Logged, Twice])
@pytest.mark.parametrize("make", [local_sgd, diloco])
def test_a_step_counts_once_whatever_is_within_it(
    make: Open, kind: Callable[..., torch.optim.Optimizer], scheduled: bool, closure: bool
) -> None:
    """A round of four steps synchronises after four of the user's steps, and not inside one of them."""
    rounds, inner, model = rounds_of(make, kind, 4)
    schedule = StepLR(inner, 2) if scheduled else None
    inside: list[bool] = []
    sync = rounds.sync

    def noting() -> Any:
        inside.append(getattr(inner, "inside", False))
        return sync()

    rounds.sync = noting
    with rounds:
        for taken in range(1, 9):
            step(inner, model, closure=closure)
            if schedule is not None:
                schedule.step()
            assert (rounds.version, rounds.local_step) == (taken // 4, taken % 4)
    assert inside == [False, False]


def test_a_step_that_fails_throws_no_count_off() -> None:
    """After an error within the user's step the next steps are counted as ever."""
    rounds, inner, model = rounds_of(local_sgd, Logged, 2)
    with rounds:
        inner.fails = True
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                step(inner, model)
        inner.fails = False
        assert rounds.local_step == 0
        for taken in range(1, 5):
            step(inner, model)
            assert rounds.version == taken // 2


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, made as Accelerate makes them: without the base class's constructor."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_a_wrapper_without_hooks_is_looked_into() -> None:
    """An optimizer that is wrapped as Accelerate does it is counted by the one within."""
    model = model_of()
    wrapped = Wrapper(torch.optim.AdamW(model.parameters(), lr=0.01))
    with farstep.LocalSGD(model, wrapped, every=2) as rounds:
        for taken in range(1, 5):
            step(wrapped, model)
            assert rounds.version == taken // 2


# -- which parameters there are --------------------------------------------------------------------------------------


def test_a_layer_that_is_unfrozen_later_is_refused_by_name(shared: RemoteOptions) -> None:
    """A parameter that trains now and is not synchronised ends the round with its name; frozen again, all goes on."""
    worker, reference = Worker(local_sgd, shared), Simulation(local_sgd, 1)
    with worker.rounds as rounds:
        worker.train(2)
        frozen = dict(worker.model.named_parameters())["frozen"]
        frozen.requires_grad_(True)
        with pytest.raises(InvalidOption, match=r"'frozen' requires gradients now.*Freeze it again") as refused:
            rounds.sync()
        assert refused.value.field == "frozen"
        assert rounds.version == 0
        frozen.requires_grad_(False)
        worker.train(1)
        assert rounds.version == 1
    reference.round()
    check_parameters(worker.parameters, reference.models[0])


@pytest.mark.parametrize("when", ["before entering", "in a round"])
@pytest.mark.parametrize("make", [local_sgd, diloco])
def test_parameters_that_were_replaced_are_synchronised(make: Open, when: str, shared: RemoteOptions) -> None:
    """What `load_state_dict(assign=True)` put into the model, and the inner optimizer steps, is synchronised."""
    worker, reference = Worker(make, shared), Simulation(make, 1)
    if when == "before entering":
        replace(worker)
    with worker.rounds:
        worker.train(2)
        if when == "in a round":
            replace(worker)
        worker.train(4)
    assert worker.rounds.version == 2
    reference.round()
    reference.round()
    check_parameters(worker.parameters, reference.models[0])


def replace(worker: Worker) -> None:
    """Put copies of the model's parameters in their places, in the inner optimizer, too, with their state."""
    before = list(worker.model.parameters())
    worker.model.load_state_dict({k: v.detach().clone() for k, v in worker.model.state_dict().items()}, assign=True)
    (group,) = worker.inner.param_groups
    for index, (old, new) in enumerate(zip(before, worker.model.parameters(), strict=True)):
        group["params"][index] = new
        if old in worker.inner.state:
            worker.inner.state[new] = worker.inner.state.pop(old)


def test_an_inner_optimizer_that_steps_other_tensors_is_refused_by_name(shared: RemoteOptions) -> None:
    """Where the model has other tensors than the inner optimizer steps, the round says so instead of drifting."""
    worker = Worker(local_sgd, shared)
    with worker.rounds as rounds:
        worker.train(1)
        worker.model.load_state_dict(worker.model.state_dict(), assign=True)
        worker.model.load_state_dict({k: v.clone() for k, v in worker.model.state_dict().items()}, assign=True)
        with pytest.raises(InvalidOption, match=r"another tensor as parameter 'p0' than the inner optimizer steps"):
            rounds.sync()


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (nn.Parameter(torch.zeros(5)), r"\[5\] now"),
        (nn.Parameter(torch.zeros(4, 3).double()), "float64"),
        (None, "is no longer"),
    ],
)
def test_parameters_of_other_forms_are_refused_by_name(new: nn.Parameter | None, words: str) -> None:
    """A parameter of another shape or dtype, or one that is gone, ends the round with its name."""
    rounds, inner, model = rounds_of(local_sgd, torch.optim.AdamW, 2)
    with rounds:
        step(inner, model)
        if new is None:
            del model.p0
        else:
            model.p0 = new
        with pytest.raises(InvalidOption, match=rf"'p0' .*{words}"):
            rounds.sync()


# -- names -----------------------------------------------------------------------------------------------------------


Wrap = Callable[[nn.Module], nn.Module]


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def both(model: nn.Module) -> nn.Module:
    return compiled(parallel(compiled(model)))


def at(place: RemoteOptions, worker: str) -> dict[str, Any]:
    return {**place, "worker": worker}


WRAPS = [compiled, parallel, both]


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models_meet_plain_ones_in_rounds(wrap: Wrap, shared: RemoteOptions) -> None:
    """A compiled or parallel model and a plain one are synchronised in one session."""
    plain, model = model_of(), model_of(1)
    inners = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    first = farstep.LocalSGD(plain, inners[0], every=1, **at(shared, "w0"))
    second = farstep.LocalSGD(wrap(model), inners[1], every=1, **at(shared, "w1"))
    with first, second:
        check_parameters(parameters_of(model), parameters_of(plain))
        step(inners[1], model)
        first.pull()
        check_parameters(parameters_of(model), parameters_of(plain))
        assert (first.version, second.version) == (1, 1)
    second.close()
    first.close()


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models_meet_plain_ones_in_steps(wrap: Wrap, shared: RemoteOptions) -> None:
    """An optimizer of a compiled model's named parameters is in the session of the plain model's."""
    plain, model = nn.Linear(3, 2), nn.Linear(3, 2)
    first = ours("SGD")(plain.named_parameters(), lr=0.1, **at(shared, "w0"))
    second = ours("SGD")(wrap(model).named_parameters(), lr=0.1, **at(shared, "w1"))
    check_parameters(list(model.parameters()), list(plain.parameters()))
    step(second, model)
    first.pull()
    check_parameters(list(model.parameters()), list(plain.parameters()))
    names = wrap(model).named_parameters()
    assert second.param_groups[0]["param_names"] == [name for name, _ in names]  # as the user gave them
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["_orig_mod.a", "_orig_mod.b"], ["a", "b"]),
        (["module.a", "module.b"], ["a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["module.module.a", "module.b"], ["module.a", "b"]),
        (["_orig_mod.module.layers.0._orig_mod.a"], ["layers.0.a"]),
        (["a", "_orig_mod.a"], ["a", "_orig_mod.a"]),
        (["_orig_mod"], ["_orig_mod"]),
        ([], []),
    ],
)
def test_names_lose_what_wrappers_put_into_them(names: list[str], plain: list[str]) -> None:
    """Only what wrappers add is left out, and nothing where two names would be one."""
    assert plain_names(names) == plain
    assert plain_names(plain) == plain


def test_a_module_of_the_users_that_is_called_module_keeps_its_name() -> None:
    """`module` counts as a wrapper's below a parallel wrapper only."""
    model = nn.Module()
    model.module = nn.Linear(2, 1)
    assert [*named_parameters(model)] == ["module.weight", "module.bias"]
    assert [*named_parameters(parallel(model))] == ["module.weight", "module.bias"]


def test_a_checkpoint_of_a_compiled_model_goes_on_with_a_plain_one() -> None:
    """What rounds of a wrapped model saved, names of an older release included, is loaded for the plain one."""
    model = model_of()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with farstep.LocalSGD(compiled(model), inner, every=2) as rounds:
        step(inner, model)
        saved: dict[str, Any] = rounds.state_dict()
    values: dict[str, Tensor] = saved["parameters"]
    for state in (saved, {**saved, "parameters": {f"_orig_mod.{name}": value for name, value in values.items()}}):
        again = farstep.LocalSGD(model, inner, every=2)
        again.load_state_dict(state)
        with again:
            assert (again.local_step, again.version) == (1, 0)
