"""Pushes that were begun and are not what `step()` sends: changes are found, and soon none is begun."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from farstep.optim import RemoteOptimizer
from farstep.overlap import CHANGED, OTHERS, PAUSE_STEPS, STREAMED
from tests.support.client.overlapping import Both, Net, backward, loss_of, wait_until_sent
from tests.support.client.twins import check_parameters, check_states
from tests.support.service.servers import RunningServer

# -- what was sent is not what has to be pushed -----------------------------------------------------------------------


def scaled_by_data(gradient: Tensor) -> None:
    gradient.data.mul_(0.5)


def scaled_in_numpy(gradient: Tensor) -> None:
    gradient.detach().numpy()[-1] += 1.0


def scaled_in_place(gradient: Tensor) -> None:
    gradient.mul_(0.5)


@pytest.mark.parametrize("change", [scaled_by_data, scaled_in_numpy, scaled_in_place])
@pytest.mark.parametrize("place", [0, 2, -1])
def test_a_gradient_that_is_changed(change: object, place: int, both: Both) -> None:
    """It is found by its bytes, first or last, and the step sends what there is: also where no counter tells."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        backward(network, seed)
        wait_until_sent(optimizer)
        if seed == 3:
            gradient = [p.grad for p in network.parameters() if p.grad is not None][place]
            assert callable(change)
            change(gradient)
        optimizer.step()

    assert both.train(4, step) == ["", STREAMED, CHANGED, STREAMED]
    both.check()


def test_a_gradient_that_is_replaced(both: Both) -> None:
    """Another tensor in a gradient's place is what is pushed; an equal one is no change."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        backward(network, seed)
        wait_until_sent(optimizer)
        weight = network.inner.weight
        assert weight.grad is not None
        if seed == 3:
            weight.grad = 2 * weight.grad
        if seed == 4:
            weight.grad = weight.grad.clone()
        optimizer.step()

    assert both.train(4, step) == ["", STREAMED, CHANGED, STREAMED]
    both.check()


def test_a_gradient_that_is_taken_away(both: Both) -> None:
    """The parameter is not stepped, and the next steps expect no gradient of it until it has one again."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        backward(network, seed)
        if seed in (3, 4):
            network.inner.weight.grad = None
        optimizer.step()

    assert both.train(7, step) == ["", STREAMED, OTHERS, STREAMED, OTHERS, STREAMED, STREAMED]
    both.check()


def test_parameters_that_are_used_in_some_steps(both: Both) -> None:
    """A gradient that is missing, and one that nobody expected, make the step an ordinary one."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        backward(network, seed, seldom=seed in (3, 4))
        optimizer.step()

    assert both.train(6, step) == ["", STREAMED, OTHERS, STREAMED, OTHERS, STREAMED]
    both.check()


def test_an_option_that_changes_after_the_backward_pass(both: Both) -> None:
    """The step is taken with the option as it is in step()."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        backward(network, seed)
        if seed == 3:
            optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()

    assert both.train(5, step) == ["", STREAMED, OTHERS, STREAMED, STREAMED]
    both.check()


@pytest.mark.parametrize("before", [True, False])
def test_a_parameter_that_is_edited(before: bool, both: Both) -> None:
    """The edit reaches the session first, whether it was made before or after the backward pass."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        if seed == 3 and before:
            network.head.weight.data.clamp_(-0.05, 0.05)
        backward(network, seed)
        if seed == 3 and not before:
            network.head.weight.data.clamp_(-0.05, 0.05)
        optimizer.step()

    assert both.train(5, step) == ["", STREAMED, OTHERS, STREAMED, STREAMED]
    both.check(versions=6)


def test_state_that_is_loaded_after_the_backward_pass(both: Both) -> None:
    """What was begun before is ended, because it would have come first."""
    both.train(2)
    saved = copy.deepcopy(both.theirs.state_dict())
    for network, optimizer in ((both.here, both.ours), (both.there, both.theirs)):
        optimizer.zero_grad()
        backward(network, 9)
        for own in saved["state"].values():
            own["sum"] = own["sum"] + 1.0
        optimizer.load_state_dict(copy.deepcopy(saved))
        saved = copy.deepcopy(both.theirs.state_dict())
        optimizer.step()
    assert both.ours.last_step is not None
    assert both.ours.last_step.overlap == OTHERS
    check_parameters([*both.here.parameters()], [*both.there.parameters()])
    check_states(both.ours.state_dict(), both.theirs.state_dict())


def test_a_pull_between_backward_pass_and_step(both: Both, server: RunningServer) -> None:
    """A gradient counts as computed on the version that is held in step(), as without overlap."""
    both.train(3)

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        backward(network, seed)
        if isinstance(optimizer, RemoteOptimizer):
            optimizer.pull()
        optimizer.step()

    assert both.train(1, step) == [STREAMED]  # nobody has stepped meanwhile
    assert both.ours.last_step is not None
    assert both.ours.last_step.staleness == 0
    both.check()


# -- giving up -------------------------------------------------------------------------------------------------------


def clipped(network: Net, optimizer: Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    backward(network, seed)
    wait_until_sent(optimizer)
    nn.utils.clip_grad_norm_(network.parameters(), 0.1)
    optimizer.step()


def unscaled(network: Net, optimizer: Optimizer, seed: int) -> None:
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    optimizer.zero_grad()
    torch.autograd.backward(scaler.scale(loss_of(network, seed)))
    wait_until_sent(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("how", [clipped, unscaled])
def test_clipping_and_scaling_are_noticed(how: object, both: Both) -> None:
    """Twice in a row is enough: the optimizer says so once, and sends gradients in step() from then on."""
    assert callable(how)
    assert both.train(2, how) == ["", CHANGED]
    with pytest.warns(UserWarning, match="after they had been sent") as warned:
        both.step(how)
    (warning,) = warned
    assert (warning.filename == __file__) == (how is clipped)  # GradScaler calls step() itself
    assert both.train(3, how) == ["", "", ""]
    both.check()


def test_it_is_tried_again(both: Both) -> None:
    """After many steps without it one more is streamed; if that helps, so are those that follow, without a word."""
    both.train(2, clipped)
    with pytest.warns(UserWarning, match="overlap"):
        both.step(clipped)
    overlap = both.ours._membership.overlap
    assert overlap is not None
    overlap._backward_order._pause = 2  # of PAUSE_STEPS, which would take long
    assert PAUSE_STEPS > 2
    assert both.train(3, clipped) == ["", "", CHANGED]
    overlap._backward_order._pause = 1
    assert both.train(4) == ["", STREAMED, STREAMED, STREAMED]
    both.check()


def test_a_skipped_step_of_a_scaler(both: Both) -> None:
    """A backward pass that no step follows leaves nothing behind, and those after it are streamed again."""
    both.train(3)
    both.ours.zero_grad()
    backward(both.here, 99)
    before = both.ours.version
    assert both.train(4)[-1] == STREAMED
    assert both.ours.version == before + 4
    both.check()
