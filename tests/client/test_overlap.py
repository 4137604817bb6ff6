"""Pushes that begin during the backward pass: torch's bits in every training, streamed where that is right."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import farstep
from farstep.consistency import Sync
from farstep.errors import InvalidOption
from farstep.foresight import PAUSE_STEPS, STREAMED
from farstep.optim import LBFGS, SGD, Adagrad, RemoteOptimizer
from farstep.overlap import AGAIN, CHANGED, OTHERS
from farstep.settings import resolve
from tests.client.overlapping import WIDTH, Both, Net, backward, loss_of, plain, wait_until_sent
from tests.client.twins import check_parameters
from tests.service.servers import RunningServer, running_server

Optimizer = torch.optim.Optimizer


@pytest.fixture
def both(server: RunningServer) -> Iterator[Both]:
    both = Both(server.url)
    yield both
    both.ours.close()


def hooks_of(network: nn.Module) -> int:
    """Return how many hooks there are on the parameters."""
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in network.parameters())


def senders() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("farstep-push")]


# -- what is streamed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adagrad", "Adamax", "SGD", "AdamW"])
def test_a_training_has_torchs_bits(name: str, server: RunningServer) -> None:
    """After a step that shows the order every step is streamed, with a shared matrix and one that is never used."""
    both = Both(server.url, name)
    assert both.train(6) == ["", *[STREAMED] * 5]
    report = both.ours.last_step
    assert report is not None
    assert (report.attempts, report.path, report.duplicate) == (1, "bodies", False)
    assert (
        0
        <= report.bytes_overlapped
        < report.bytes_sent
        == sum(p.nbytes for p in both.here.parameters() if p.grad is not None)
    )
    both.check()
    both.ours.close()


def test_it_is_off_unless_asked_for(server: RunningServer) -> None:
    """Without the option there is no hook, and nothing is begun early."""
    both = Both(server.url, overlap=False)
    assert both.train(3) == ["", "", ""]
    assert hooks_of(both.here) == 0
    with both.ours.no_sync():
        both.step()
    both.check()


@pytest.mark.parametrize("wire", ["bf16", farstep.Wire(parameters="fp16")])
def test_gradients_in_16_bits(wire: object, server: RunningServer) -> None:
    """What is streamed is narrowed as it would be in step()."""
    streamed, whole = Both(server.url, wire=wire), Both(server.url, wire=wire, overlap=False)
    assert streamed.train(4) == ["", *[STREAMED] * 3]
    whole.train(4)
    check_parameters([*streamed.here.parameters()], [*whole.here.parameters()])


def test_float16_gradients_are_looked_at_first(server: RunningServer) -> None:
    """They are not streamed: one that float16 makes infinite must not reach the server."""
    assert Both(server.url, wire="fp16").train(3) == ["", "", ""]


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_gradients_that_are_not_in_rows(both: Both) -> None:
    """A gradient that is a transposed view travels as it shows."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        if seed == 1:
            network.inner.weight.grad = torch.zeros_like(network.inner.weight).t().contiguous().t()
        backward(network, seed)
        assert network.inner.weight.grad is not None
        assert not network.inner.weight.grad.is_contiguous()
        optimizer.step()

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()


def test_workers_of_a_sync_session(server: RunningServer) -> None:
    """Two workers stream their gradients, which are averaged in the order of their names."""
    nets = [Net(), Net()]
    ours = [
        SGD(
            net.parameters(), 0.1, server=server.url, session="overlapping", worker=f"w{i}", kernel="reference",
            consistency=Sync(workers=2), overlap=True,
        )
        for i, net in enumerate(nets)
    ]  # fmt: skip
    oracle = Net()
    theirs = SGD(oracle.parameters(), 0.1, kernel="reference")
    with ThreadPoolExecutor(2) as threads:
        for seed in range(4):
            for i, (net, optimizer) in enumerate(zip(nets, ours, strict=True)):
                optimizer.zero_grad()
                backward(net, 2 * seed + i)
            sums = [
                None if p.grad is None or q.grad is None else (p.grad + q.grad) / 2
                for p, q in zip(*(net.parameters() for net in nets), strict=True)
            ]
            list(threads.map(lambda each: each.step(), ours))
            for p, mean in zip(oracle.parameters(), sums, strict=True):
                p.grad = mean
            theirs.step()
            for net in nets:
                check_parameters([*net.parameters()], [*oracle.parameters()])
    assert [each.last_step.overlap for each in ours if each.last_step] == [STREAMED] * 2
    for each in ours:
        each.close()


def test_a_closure(both: Both) -> None:
    """A backward pass inside of step() is streamed as well."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            loss = loss_of(network, seed)
            torch.autograd.backward(loss)
            return loss.item()

        optimizer.step(closure)

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()


def test_a_schedule(both: Both) -> None:
    """A learning rate that changes between steps travels with the stream."""
    schedules = {id(each): torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (both.ours, both.theirs)}

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        plain(network, optimizer, seed)
        schedules[id(optimizer)].step()

    assert both.train(5, step) == ["", *[STREAMED] * 4]
    both.check()


# -- several backward passes -----------------------------------------------------------------------------------------


def test_accumulation_is_learnt(both: Both) -> None:
    """A loop that accumulates three times in each step is streamed in the third backward pass, without being told."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(3):
            backward(network, 10 * seed + part)
        optimizer.step()

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()


def test_accumulation_that_is_irregular_can_be_said(both: Both) -> None:
    """Backward passes inside no_sync() are not streamed, however many there are; the one that follows is."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(seed % 3):
            if isinstance(optimizer, RemoteOptimizer):
                with optimizer.no_sync():
                    backward(network, 10 * seed + part)
            else:
                backward(network, 10 * seed + part)
        backward(network, seed)
        optimizer.step()

    assert both.train(6, step) == ["", *[STREAMED] * 5]
    both.check()


def test_one_more_backward_pass_than_before(both: Both) -> None:
    """A stream whose gradients are accumulated again is ended, and the next step knows better."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(1 if seed < 3 else 2):
            backward(network, 10 * seed + part)
        optimizer.step()

    assert both.train(5, step) == ["", STREAMED, AGAIN, STREAMED, STREAMED]
    both.check()


def test_one_backward_pass_less_than_before(both: Both) -> None:
    """Nothing is streamed then, and the step is an ordinary one."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in range(2 if seed < 3 else 1):
            backward(network, 10 * seed + part)
        optimizer.step()

    assert both.train(5, step) == ["", STREAMED, "", STREAMED, STREAMED]
    both.check()


def test_two_losses_and_gradients_of_gradients(both: Both) -> None:
    """Graphs that are kept, and gradients that have one, are streamed when the last of them has been added."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        loss = loss_of(network, seed)
        torch.autograd.backward(loss, retain_graph=True)
        norms = [g.square().sum() for g in torch.autograd.grad(loss, [network.inner.weight], create_graph=True)]
        torch.autograd.backward(0.1 * norms[0])
        optimizer.step()

    assert both.train(4, step) == ["", *[STREAMED] * 3]
    both.check()


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


def test_a_pull_between_backward_pass_and_step(both: Both, server: RunningServer) -> None:
    """A gradient counts as computed on the version that is held in step(), as without overlap."""
    both.train(3)
    both.ours.zero_grad()
    backward(both.here, 4)
    both.ours.pull()
    both.ours.step()
    assert both.ours.last_step is not None
    assert both.ours.last_step.overlap == STREAMED  # nobody has stepped meanwhile


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
    overlap._foresight._pause = 2  # of PAUSE_STEPS, which would take long
    assert PAUSE_STEPS > 2
    assert both.train(3, clipped) == ["", "", CHANGED]
    overlap._foresight._pause = 1
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


# -- where there is nothing to stream --------------------------------------------------------------------------------


def test_gradients_that_are_set_by_hand(both: Both) -> None:
    """No backward pass, no stream."""

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        for p in network.parameters():
            p.grad = torch.full_like(p, 0.1 * seed)
        optimizer.step()

    both.train(2)
    assert both.train(3, step) == ["", "", ""]
    both.check()


def test_sparse_gradients(server: RunningServer) -> None:
    """Among them there is no stream."""
    nets = [nn.Sequential(nn.Embedding(500, 100, sparse=True), nn.Linear(100, 100)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = Adagrad(nets[0].parameters(), server=server.url, kernel="reference", overlap=True)
    theirs = torch.optim.Adagrad(nets[1].parameters(), foreach=False)
    for _ in range(3):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(net(torch.arange(20)).square().mean())
            optimizer.step()
        assert ours.last_step is not None
        assert ours.last_step.overlap == ""
    check_parameters([*nets[0].parameters()], [*nets[1].parameters()])
    ours.close()


def test_a_small_model(server: RunningServer) -> None:
    """A thread would take longer than what it hides."""
    net = nn.Linear(10, 10)
    optimizer = Adagrad(net.parameters(), server=server.url, overlap=True)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(net(torch.ones(2, 10)).sum())
        optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.overlap == ""
    optimizer.close()


def test_embedded_and_lbfgs_do_as_without(server: RunningServer) -> None:
    """They take the option, and watch nothing."""
    net = Net()
    SGD(net.parameters(), overlap=True)
    LBFGS(net.parameters(), server=server.url, overlap=True).close()
    assert hooks_of(net) == 0


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_go_with_the_optimizer(server: RunningServer) -> None:
    """close() removes them and ends the thread of a stream; so does an optimizer that nobody has any more."""
    net = Net()
    optimizer: RemoteOptimizer | None = None
    for way in ("close", "forget"):
        optimizer = Adagrad(net.parameters(), server=server.url, overlap=True)
        for seed in range(2):
            plain(net, optimizer, seed)
        assert hooks_of(net) == 8
        optimizer.zero_grad()
        backward(net, 3)
        assert len(senders()) == 1
        if way == "close":
            optimizer.close()
        optimizer = None
        gc.collect()
        assert hooks_of(net) == 0
        assert senders() == []


def test_copies_have_hooks_of_their_own(both: Both) -> None:
    """A copied model has none; a copied optimizer watches what it is over."""
    both.train(2)
    assert hooks_of(copy.deepcopy(both.here)) == 0
    assert hooks_of(copy.copy(both.here)) == 8  # the very same parameters
    network, optimizer = copy.deepcopy((both.here, both.ours))
    assert hooks_of(network) == hooks_of(both.here) == 8
    for seed in range(3):
        plain(network, optimizer, seed)
    assert optimizer.last_step is not None
    assert optimizer.last_step.overlap == STREAMED
    optimizer.close()
    both.train(2)
    both.check()


def test_parameters_that_come_later(server: RunningServer) -> None:
    """Those of a group that is added, and those that are thawed, are streamed from their second step on."""

    def freeze(network: Net) -> None:
        network.inner.requires_grad_(False)

    frozen = Both(server.url, prepare=freeze)
    late = [nn.Parameter(torch.ones(WIDTH)) for _ in range(2)]
    for p, optimizer in zip(late, (frozen.ours, frozen.theirs), strict=True):
        optimizer.add_param_group({"params": [p], "lr": 0.2})
    uses = {id(frozen.ours): late[0], id(frozen.theirs): late[1]}

    def step(network: Net, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        if seed == 4:
            network.inner.requires_grad_(True)
        loss = loss_of(network, seed) + (uses[id(optimizer)] * seed).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()

    assert frozen.train(6, step) == ["", STREAMED, STREAMED, OTHERS, "", STREAMED]
    frozen.check(versions=7)
    check_parameters([late[0]], [late[1]])
    frozen.ours.close()


# -- the option ------------------------------------------------------------------------------------------------------


def test_the_option_and_its_variable() -> None:
    """It is off by default, on by either, and the argument wins; anything else is refused by name."""
    assert not resolve({}, {}).overlap
    assert resolve({"overlap": True}, {}).overlap
    assert resolve({}, {"FARSTEP_OVERLAP": "1"}).overlap
    assert not resolve({}, {"FARSTEP_OVERLAP": "0"}).overlap
    assert not resolve({"overlap": False}, {"FARSTEP_OVERLAP": "1"}).overlap
    with pytest.raises(InvalidOption, match="FARSTEP_OVERLAP"):
        resolve({}, {"FARSTEP_OVERLAP": "yes"})
    with pytest.raises(InvalidOption, match="overlap"):
        resolve({"overlap": 1}, {})  # type: ignore[typeddict-item]


def test_an_optimizer_that_is_moved(server: RunningServer) -> None:
    """farstep.remote takes the option as the constructors do."""
    net = Net()
    optimizer = farstep.remote(torch.optim.SGD(net.parameters(), lr=0.1), server=server.url, overlap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            plain(net, optimizer, seed)
    assert optimizer.last_step is not None
    assert optimizer.last_step.overlap == STREAMED
    optimizer.close()


def test_shared_memory_goes_first(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Over a unix socket gradients are put into shared memory in step(), and nothing is streamed."""
    with running_server("--unix", str(tmp_path_factory.mktemp("o") / "s")) as local:
        both = Both(local.unix)
        assert both.train(3) == ["", "", ""]
        assert both.ours.last_step is not None
        assert both.ours.last_step.path == "shared memory"
        both.check()
        both.ours.close()
