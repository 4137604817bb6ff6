"""Hooks, local and global, fire as torch's do: once, in its order, with its arguments, and what they change counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import farstep
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_parameters, check_states, drawn, parameters

Optimizer = torch.optim.Optimizer
Event = tuple[Any, ...]


def both(twins: Twins) -> tuple[Optimizer, Optimizer]:
    return twins.ours, twins.theirs


@pytest.fixture
def twins(place: RemoteOptions) -> Twins:
    """Return an Adamax of ours and torch's, after two steps."""
    twins = Twins("Adamax", {}, place)
    twins.train(2)
    return twins


def recording(optimizer: Optimizer, events: list[Event]) -> Callable[[str], Callable[..., None]]:
    """Return a maker of hooks that record what they are called with."""

    def named(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            shown = [each is optimizer if isinstance(each, Optimizer) else type(each).__name__ for each in args]
            events.append((name, *shown))

        return hook

    return named


def test_hooks_of_state_dicts_fire_in_torchs_order(twins: Twins) -> None:
    """All four, each also with `prepend`: order, number and arguments are torch's."""
    seen: list[list[Event]] = []
    for optimizer in both(twins):
        events: list[Event] = []
        hook = recording(optimizer, events)
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            register = getattr(optimizer, f"register_{kind}_hook")
            register(hook(f"{kind} first"))
            register(hook(f"{kind} second"))
            register(hook(f"{kind} ahead"), prepend=True)
            register(hook(f"{kind} removed")).remove()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.state_dict()
        seen.append(events)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 18
    twins.train(1, first=3)
    twins.check()


def test_a_hook_may_give_another_state_dict(twins: Twins) -> None:
    """What a state_dict post hook or a load pre hook returns is taken in the place of what there was."""

    def halved(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(given)
        for own in changed["state"].values():
            own["exp_avg"].mul_(0.5)
        return changed

    given = []
    for optimizer in both(twins):
        optimizer.register_state_dict_post_hook(halved)
        optimizer.register_load_state_dict_pre_hook(halved)
        given.append(optimizer.state_dict())
        optimizer.load_state_dict(given[-1])
    check_states(*given)
    twins.train(2, first=3)
    twins.check()


def test_hooks_may_change_state_in_place(twins: Twins) -> None:
    """What is done to state before a state_dict is in it, and what is done after a load goes to the session."""

    def before(optimizer: Optimizer) -> None:
        for own in optimizer.state.values():
            own["exp_inf"].mul_(2)

    def after(optimizer: Optimizer) -> None:
        for p, own in list(optimizer.state.items()):
            own["exp_avg"] = torch.full_like(p, 0.25)
        optimizer.param_groups[0]["lr"] = 0.5

    for optimizer in both(twins):
        optimizer.register_state_dict_pre_hook(before)
        optimizer.register_load_state_dict_post_hook(after)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins.train(2, first=3)
    twins.check()


# -- steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere() -> Iterator[list[Event]]:
    """Record what hooks of all optimizers are called with, and remove them afterwards."""
    events: list[Event] = []

    def record(name: str) -> Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            events.append((name, args[0] is optimizer, len(args), sorted(kwargs)))

        return hook

    handles = [
        register_optimizer_step_pre_hook(record("global pre")),
        register_optimizer_step_post_hook(record("global post")),
    ]
    yield events
    for handle in handles:
        handle.remove()


@pytest.mark.promise(
    "The public methods, attributes and hooks of a torch optimizer are there and behave as torch's.",
    area="bits of torch",
)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_steps_fire_once_in_torchs_order(name: str, everywhere: list[Event], place: RemoteOptions) -> None:
    """Global, local, step, local, global, for steps without and with a closure given either way."""
    twins = Twins(name, {}, place)
    twins.give(twins.drawn(1))
    seen: list[list[Event]] = []
    for optimizer in both(twins):
        everywhere.clear()

        def local(name: str) -> Callable[..., None]:
            return lambda each, args, kwargs: everywhere.append((name, args[0] is each, len(args), sorted(kwargs)))

        def closure() -> float:
            everywhere.append(("closure",))
            return 1.0

        optimizer.register_step_pre_hook(local("pre"))
        optimizer.register_step_post_hook(local("post"))
        optimizer.step()
        optimizer.step(closure)
        optimizer.step(closure=closure)
        seen.append(list(everywhere))
    assert seen[0] == seen[1]
    assert [event[0] for event in seen[0][:4]] == ["global pre", "pre", "post", "global post"]
    assert len(seen[0]) == 4 + 5 + 5
    twins.check()


def test_a_hook_before_the_step_may_change_its_arguments(place: RemoteOptions) -> None:
    """A pre hook that returns arguments gives the step another closure; what is no pair is torch's RuntimeError."""
    twins = Twins("Adagrad", {"lr": 0.1}, place)
    twins.give(twins.drawn(1))
    for optimizer in both(twins):
        handle = optimizer.register_step_pre_hook(lambda each, args, kwargs: ((each, lambda: 7.0), {}))
        assert optimizer.step() == 7.0
        handle.remove()
    errors = []
    for optimizer in both(twins):
        optimizer.register_step_pre_hook(lambda *_: 3)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="must return None or a tuple") as refused:
            optimizer.step()
        errors.append(str(refused.value).partition("> ")[2])
    assert errors[0] == errors[1]
    assert twins.ours.version == 1
    twins.check()


def test_gradients_and_parameters_changed_by_hooks_count(place: RemoteOptions) -> None:
    """A pre hook clips gradients and a post hook the parameters, as training recipes do."""

    def clip(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)

    def bound(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.data.clamp_(-0.5, 0.5)

    twins = Twins("Adagrad", {"lr": 0.1}, place)
    for optimizer in both(twins):
        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(bound)
    twins.train(3)
    twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_the_profiler_sees_steps_as_torchs(name: str, place: RemoteOptions) -> None:
    """`Optimizer.step#<Name>.step` and `Optimizer.zero_grad#<Name>.zero_grad`, once for each call."""
    twins = Twins(name, {}, place)
    twins.give(twins.drawn(1))
    found = []
    for optimizer in both(twins):
        with torch.autograd.profiler.profile() as profile:
            optimizer.step()
            optimizer.zero_grad()
        found.append(sorted(each.name for each in profile.function_events if each.name.startswith("Optimizer.")))
    assert found[0] == found[1] == [f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"]


def test_steps_are_not_compiled(place: RemoteOptions) -> None:
    """Inside `torch.compile` a step runs as it is, in one call, and counts once."""
    twins = Twins("Adagrad", {"lr": 0.1}, place)
    twins.give(twins.drawn(1))
    compiled = torch.compile(lambda: twins.ours.step(), backend="eager")
    for _ in range(2):
        compiled()
        twins.theirs.step()
    assert twins.ours.version == 2
    twins.check()


def test_a_step_of_a_subclass_that_calls_its_bases_fires_twice_as_torchs(place: RemoteOptions) -> None:
    """A subclass with a step of its own is patched as well, in torch and here alike."""
    counts = []
    for base, options in ((farstep.optim.Adagrad, place), (torch.optim.Adagrad, {"foreach": False})):

        class Own(base):  # type: ignore[misc,valid-type]
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        (p,) = parameters(drawn(0, [(3,)]))
        p.grad = torch.ones(3)
        optimizer = Own([p], **options)
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        optimizer.step()
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_zero_grad_is_torchs(place: RemoteOptions) -> None:
    """Gradients become None, or zeros in the same tensors, whatever `foreach` says."""
    for foreach in (False, True):
        (p,) = parameters(drawn(0, [(3,)]))
        optimizer = Adagrad([p], foreach=foreach, **place)
        p.grad = gradient = torch.ones(3)
        optimizer.zero_grad(set_to_none=False)
        assert p.grad is gradient
        check_parameters([gradient], [torch.zeros(3)])
        optimizer.zero_grad()
        assert p.grad is None
        optimizer.zero_grad(set_to_none=False)
        assert p.grad is None
