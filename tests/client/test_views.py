"""Views: the average of the parameters, read and put in their place for an evaluation, embedded and on a server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farstep
from farstep.errors import FarstepError, InvalidOption, TensorMismatch
from farstep.optim import SGD, Adam, RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.session.averaged import DECAY, averaged
from tests.support.client.twins import Twins, check_equal, check_parameters, drawn, parameters
from tests.support.client.workers import Worker
from tests.support.service.servers import RunningServer


class Averages:
    """torch's average of parameters."""

    def __init__(self, watched: list[Tensor]) -> None:
        self._model = nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in watched)
        self._averages = averaged(self._model)

    def update(self) -> None:
        self._averages.update_parameters(self._model)

    @property
    def values(self) -> list[Tensor]:
        return [p.detach() for p in self._averages.parameters()]


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def trained(place: RemoteOptions, steps: int = 3, **options: Any) -> tuple[list[Tensor], RemoteOptimizer]:
    ps = parameters(drawn(0))
    optimizer = Adam(ps, lr=0.1, **place, **options)
    for seed in range(steps):
        step(ps, optimizer, seed)
    return ps, optimizer


def step(ps: list[Tensor], optimizer: RemoteOptimizer, seed: int) -> None:
    for p, gradient in zip(ps, drawn(seed + 1), strict=True):
        p.grad = gradient
    optimizer.step()


@pytest.mark.promise(
    "`ema=` is torch's averaged model, and evaluating with it changes nothing of the training.",
    area="NaN, clipping and averages",
)
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "Muon"])
def test_the_average_is_torchs(name: str, place: RemoteOptions, one_thread: None) -> None:
    """Bit for bit `AveragedModel`'s with its EMA; before the first step it is the parameters."""
    twins = Twins(name, {"lr": 0.1}, {**place, "ema": DECAY})
    there = Averages(twins.there)
    assert twins.ours.views == ("ema",)
    check_equal(twins.ours.pull_view("ema"), [p.detach() for p in twins.here])
    for seed in range(1, 5):
        twins.step(twins.drawn(seed))
        there.update()
        check_equal(twins.ours.pull_view("ema"), there.values)
        twins.check()


def test_swapping_puts_the_average_into_the_parameters_and_takes_it_out(place: RemoteOptions) -> None:
    """Inside the block the model computes with the average, after it with exactly what it had: the same tensors and
    bits, zeros of either sign and all."""
    ps, optimizer = trained(place, ema=DECAY)
    with torch.no_grad():
        ps[1][:2] = torch.tensor([-0.0, 1e-45])
    before, average, own = bits(ps), optimizer.pull_view("ema"), list(map(id, optimizer.param_groups[0]["params"]))
    with optimizer.swap_to("ema"):
        check_parameters(ps, average)
        assert list(map(id, optimizer.param_groups[0]["params"])) == own
    assert bits(ps) == before
    step(ps, optimizer, 9)
    assert optimizer.version == (5 if "server" in place else 4)  # on a server the edit above is a write


def test_an_error_inside_gives_the_parameters_back(place: RemoteOptions) -> None:
    """Whatever is raised passes on, and training continues as if nothing had been evaluated."""
    ps, optimizer = trained(place, ema=DECAY)
    others, undisturbed = trained(place, ema=DECAY)
    with pytest.raises(KeyboardInterrupt), optimizer.swap_to("ema"):
        raise KeyboardInterrupt
    assert bits(ps) == bits(others)
    for each in ((ps, optimizer), (others, undisturbed)):
        step(*each, 9)
    assert bits(ps) == bits(others)
    check_equal(optimizer.pull_view("ema"), undisturbed.pull_view("ema"))


@pytest.mark.promise(
    "`ema=` is torch's averaged model, and evaluating with it changes nothing of the training.",
    area="NaN, clipping and averages",
)
def test_a_training_that_evaluates_is_the_one_that_does_not(place: RemoteOptions) -> None:
    """Swapping after each step changes nothing of what follows, and sends no parameters."""
    ps, optimizer = trained(place, steps=0, ema=DECAY)
    others, undisturbed = trained(place, steps=0, ema=DECAY)
    for seed in range(4):
        step(ps, optimizer, seed)
        with optimizer.swap_to("ema"):
            pass
        step(others, undisturbed, seed)
    assert optimizer.version == undisturbed.version == 4
    assert bits(ps) == bits(others)


@pytest.mark.parametrize("what", ["step", "pull", "rejoin", "add_param_group", "swap_to"])
def test_inside_nothing_takes_the_average_for_the_parameters(what: str, place: RemoteOptions) -> None:
    """A step and what else would write is refused with the way out; afterwards it works."""
    ps, optimizer = trained(place, ema=DECAY)
    version = optimizer.version

    def swap() -> None:
        with optimizer.swap_to("ema"):
            pass

    late = {"params": parameters(drawn(1, [(2,)]))}
    calls = {
        "step": lambda: step(ps, optimizer, 5),
        "pull": optimizer.pull,
        "rejoin": lambda: optimizer.rejoin(optimizer.state_dict()),
        "add_param_group": lambda: optimizer.add_param_group(late),
        "swap_to": swap,
    }
    with optimizer.swap_to("ema"):
        inside = bits(ps)
        with pytest.raises(FarstepError, match=rf"{what}\(.*\) inside swap_to\('ema'\).*Leave the `with` block"):
            calls[what]()
        assert bits(ps) == inside
        optimizer.state_dict()
    assert (optimizer.version, len(optimizer.param_groups)) == (version, 1)
    calls[what]()


def test_an_edit_before_is_still_an_edit_after(place: RemoteOptions) -> None:
    """What was written into the parameters and not yet sent is not lost by an evaluation."""
    ps, optimizer = trained(place, ema=DECAY)
    with torch.no_grad():
        ps[0].fill_(2.0)
    with optimizer.swap_to("ema"):
        pass
    assert ps[0].eq(2.0).all()
    for p in ps:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert ps[0].ne(0).all()


def test_what_is_written_inside_is_lost(place: RemoteOptions) -> None:
    """It is written into the average's copy, and neither into the parameters nor into the session's average."""
    ps, optimizer = trained(place, ema=DECAY)
    before, average = bits(ps), bits(optimizer.pull_view("ema"))
    with torch.no_grad(), optimizer.swap_to("ema"):
        for p in ps:
            p.fill_(7.0)
    assert bits(ps) == before
    assert bits(optimizer.pull_view("ema")) == average


def test_a_copy_begins_another_average(place: RemoteOptions) -> None:
    """Its first step's parameters begin it; the original's goes on as if there were no copy."""
    ps, optimizer = trained(place, ema=DECAY)
    average = bits(optimizer.pull_view("ema"))
    copied = copy.deepcopy(optimizer)
    others = copied.param_groups[0]["params"]
    assert bits(copied.pull_view("ema")) == bits(others) == bits(ps)
    step(others, copied, 4)
    assert bits(copied.pull_view("ema")) == bits(others)
    assert bits(optimizer.pull_view("ema")) == average


def test_asgd_has_its_own_average(place: RemoteOptions) -> None:
    """`ax` is a view without any option, and torch's; a parameter without steps has itself."""
    twins = Twins("ASGD", {"lr": 0.1, "t0": 1.0, "lambd": 0.1}, place)
    assert twins.ours.views == ("ax",)
    check_equal(twins.ours.pull_view("ax"), [p.detach() for p in twins.here])
    for seed in range(1, 4):
        gradients: list[Tensor | None] = [None, *twins.drawn(seed)[1:]]
        twins.step(gradients)
    there = twins.theirs.state
    expected = [there[p]["ax"] if p in there else p.detach() for p in twins.there]
    check_equal(twins.ours.pull_view("ax"), expected)
    before = bits(twins.here)
    with twins.ours.swap_to("ax"):
        check_parameters(twins.here, expected)
    assert bits(twins.here) == before
    with pytest.raises(InvalidOption, match=r"state\[p\]\['ax'\]"):
        twins.ours.write_view("ax", expected)
    twins.check()


@pytest.mark.parametrize("options", [{}, {"ema": DECAY}])
def test_a_view_that_does_not_exist_is_refused_by_name(options: dict[str, Any], place: RemoteOptions) -> None:
    """The error says which there are, and how to get one; the parameters are untouched."""
    ps, optimizer = trained(place, **options)
    before = bits(ps)
    with pytest.raises(InvalidOption, match=f"no view 'exp_avg'; it has {'ema' if options else 'none'}"):
        optimizer.pull_view("exp_avg")
    with pytest.raises(InvalidOption, match="no view"), optimizer.swap_to("ax"):
        pytest.fail("there is nothing to swap to")
    assert bits(ps) == before


def test_a_checkpoint_of_the_average_can_be_loaded(place: RemoteOptions) -> None:
    """The state_dict is torch's and has nothing of it; what `pull_view` returned is put back by `write_view`."""
    ps, optimizer = trained(place, ema=DECAY)
    saved, average = copy.deepcopy(optimizer.state_dict()), optimizer.pull_view("ema")
    assert saved.keys() == {"state", "param_groups"}
    others = parameters(ps)
    options: RemoteOptions = {**place, "ema": DECAY}
    resumed = Adam(others, lr=0.1, **options)
    resumed.load_state_dict(saved)
    resumed.write_view("ema", average)
    for each in ((ps, optimizer), (others, resumed)):
        step(*each, 7)
    assert bits(ps) == bits(others)
    check_equal(optimizer.pull_view("ema"), resumed.pull_view("ema"))


def test_values_that_do_not_fit_are_refused(place: RemoteOptions) -> None:
    """One too few, another shape, another dtype: nothing of it is written."""
    _, optimizer = trained(place, ema=DECAY)
    average = optimizer.pull_view("ema")
    wrong = [average[:-1], [average[0].t(), *average[1:]], [each.double() for each in average]]
    for values in wrong:
        with pytest.raises(TensorMismatch, match="shapes and dtypes"):
            optimizer.write_view("ema", values)
    check_equal(optimizer.pull_view("ema"), average)


def test_the_average_is_the_sessions_and_not_a_workers(shared: RemoteOptions) -> None:
    """Every worker sees the same one, of all their steps; evaluating with it, one is not in the others' way."""
    place: RemoteOptions = {**shared, "ema": DECAY}
    w0, w1 = Worker(place, "w0"), Worker(place, "w1")
    w0.step(drawn(1))
    with w0.optimizer.swap_to("ema"):
        w1.step(drawn(2))
    check_equal(w0.optimizer.pull_view("ema"), w1.optimizer.pull_view("ema"))
    w0.step(drawn(3))
    assert w0.optimizer.version == 3


def test_a_session_file_has_the_average(server: RunningServer, shared: RemoteOptions, tmp_path: Path) -> None:
    """After an export and an import under another name it is there, bit for bit."""
    worker = Worker({**shared, "ema": DECAY}, "w0")
    for seed in range(1, 3):
        worker.step(drawn(seed))
    file, name = tmp_path / "s.safetensors", f"{worker.optimizer.session}-again"
    farstep.export_session(worker.optimizer.session, file, server=server.url)
    farstep.import_session(file, name=name, server=server.url)
    again = Worker({**shared, "session": name, "ema": DECAY}, "w0", seed=5)
    check_equal(again.optimizer.pull_view("ema"), worker.optimizer.pull_view("ema"))
    with pytest.raises(FarstepError, match=r"ema is 0\.9, not None"):
        Worker({**shared, "session": name}, "w1")


def test_a_model_on_16_bits_has_an_average(place: RemoteOptions) -> None:
    """It is in the parameters' dtype, as torch's is."""
    start = drawn(0, dtype=torch.bfloat16)
    twins = Twins("SGD", {"lr": 0.1}, {**place, "ema": DECAY}, start=start)
    there = Averages(twins.there)
    for seed in range(1, 4):
        twins.step(twins.drawn(seed))
        there.update()
    average = twins.ours.pull_view("ema")
    check_equal(average, there.values, exact=False)
    assert {each.dtype for each in average} == {torch.bfloat16}


def test_saving_inside_saves_the_average(place: RemoteOptions) -> None:
    """A model's state_dict taken inside the block holds the view's values, as an evaluation expects."""
    network = nn.Linear(3, 2)
    options: RemoteOptions = {**place, "ema": DECAY}
    optimizer = SGD(network.parameters(), lr=0.1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.ones(3)).sum().backward()
        optimizer.step()
    average = optimizer.pull_view("ema")
    with optimizer.swap_to("ema"):
        saved = copy.deepcopy(network.state_dict())
    check_equal(list(saved.values()), average)
    assert not torch.equal(saved["weight"], network.weight)
