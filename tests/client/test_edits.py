"""Whatever the caller does to parameters between steps counts, also what leaves their version counters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from farstep.errors import Unavailable
from farstep.optim import SGD, Adagrad
from farstep.settings import RemoteOptions
from farstep.tensors.edits import Edits
from tests.support.client.carrying import Counting
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_parameters, drawn, parameters
from tests.support.faults import Network
from tests.support.service.servers import RunningServer

Model = nn.Module


def model() -> Model:
    """Return a module of a few small parameters, the first of them without elements."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False), nn.PReLU(4))
    made.empty = nn.Parameter(torch.empty(0, 3))
    return made


def weight_of(model: Model) -> Tensor:
    return model.get_parameter("0.weight")


def by_copy(model: Model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(drawn(3, [p.shape])[0])


def by_arithmetic(model: Model) -> None:
    with torch.no_grad():
        weight_of(model).add_(1)


def by_one_element(model: Model) -> None:
    with torch.no_grad():
        weight_of(model)[-1, -1] = 7


def behind_the_counter(model: Model) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def by_clamping(model: Model) -> None:
    # As the critic of a Wasserstein GAN is kept in bounds.
    for p in model.parameters():
        p.data.clamp_(-0.1, 0.1)


def by_other_memory(model: Model) -> None:
    for p in model.parameters():
        p.data = drawn(5, [p.shape])[0]


def by_memory_of_other_strides(model: Model) -> None:
    p = weight_of(model)
    p.data = drawn(5, [p.shape[::-1]])[0].t()


def by_loading(model: Model) -> None:
    model.load_state_dict({name: drawn(4, [p.shape])[0] for name, p in model.state_dict().items()})


def by_assigning(model: Model) -> None:
    model.load_state_dict({name: drawn(4, [p.shape])[0] for name, p in model.state_dict().items()})
    for p in model.parameters():
        p.data = p.data.clone()


def by_a_vector(model: Model) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(0.5 * vector, model.parameters())


def by_swapping_there_and_back(model: Model) -> None:
    # As an average of the weights is put in for an evaluation.
    for p in model.parameters():
        kept = p.data.clone()
        p.data.zero_()
        p.data.copy_(kept)


def by_initialising(model: Model) -> None:
    torch.manual_seed(9)
    for p in model.parameters():
        nn.init.uniform_(p)


EDITS = [
    by_copy,
    by_arithmetic,
    by_one_element,
    behind_the_counter,
    by_clamping,
    by_other_memory,
    by_memory_of_other_strides,
    by_loading,
    by_assigning,
    by_a_vector,
    by_swapping_there_and_back,
    by_initialising,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_every_edit_counts(edit: Callable[[Model], None], place: RemoteOptions) -> None:
    """Before the first step, between steps, and twice in a row: training goes on from what is in the parameters."""
    models = [model(), model()]
    optimizers = [
        Adagrad(models[0].parameters(), lr=0.1, **place),
        torch.optim.Adagrad(models[1].parameters(), lr=0.1, foreach=False),
    ]
    for seed in range(4):
        for each, optimizer in zip(models, optimizers, strict=True):
            edit(each)
            for p in each.parameters():
                p.grad = drawn(seed, [p.shape])[0]
            optimizer.step()
        check_parameters(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_edits_behind_the_counter_count_for_every_optimizer(name: str, place: RemoteOptions) -> None:
    """Parameters written through `.data` are where the next step begins, and the state goes on."""
    twins = Twins(name, {}, place)
    for seed in range(1, 4):
        twins.train(1, first=seed)
        for p in (*twins.here, *twins.there):
            p.data.mul_(0.5)
    twins.train(1, first=4)
    twins.check()


def odd(dtype: torch.dtype) -> Iterator[Tensor]:
    """Return tensors whose memory is not simply their elements one after the other."""
    (whole, part) = drawn(0, [(6, 5), (4, 4, 2)], dtype)
    yield whole.t()
    yield part[..., 0]
    if not dtype.is_complex:  # torch does not step on lazily conjugated ones
        yield torch.view_as_complex(drawn(1, [(4, 2)])[0]).conj().imag.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_edits_of_parameters_of_any_strides(dtype: torch.dtype, place: RemoteOptions) -> None:
    """Transposed, sliced and lazily negated parameters are compared as what they show."""
    here, there = ([p.requires_grad_() for p in odd(dtype)] for _ in range(2))
    ours, theirs = Adagrad(here, lr=0.1, **place), torch.optim.Adagrad(there, lr=0.1, foreach=False)
    for seed in range(1, 4):
        for ps, optimizer in ((here, ours), (there, theirs)):
            for p in ps:
                p.grad = drawn(seed, [p.shape], p.dtype)[0]
                p.data.mul_(0.5)
            optimizer.step()
    check_parameters(here, there)


def test_what_is_put_back_is_not_sent(server: RunningServer) -> None:
    """Weights that were exchanged for an evaluation and are back as they were move no bytes, edits only their own."""
    transport = Counting()
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "transport": transport}
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, [(300, 40), (70,)]))
    twins.train(2)
    usual = transport.during(lambda: twins.train(1, first=3))
    for p in twins.here:
        kept = p.detach().clone()
        with torch.no_grad():
            p.zero_()
            p.copy_(kept)
    assert transport.during(lambda: twins.train(1, first=4)) == usual
    for p in (twins.here[1], twins.there[1]):
        p.data.zero_()
    assert usual < transport.during(lambda: twins.train(1, first=5)) < usual + 1000
    twins.check()


def test_an_answer_that_was_cut_off_is_no_edit(network: Network) -> None:
    """What had arrived of a step that was given up does not pass for what the session has."""
    shapes = [(200, 300), (5,)]
    place: RemoteOptions = {"kernel": "reference", "server": network.url, "timeout_s": 1.0}
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, shapes))
    twins.train(1)
    before = [p.detach().clone() for p in twins.here]
    twins.give(drawn(2, shapes))
    network.cut_response(after=150_000, then_down=True)
    with pytest.raises(Unavailable):
        twins.ours.step()
    check_parameters(twins.here, before)
    network.down = False
    for p in (*twins.here, *twins.there):
        assert p.grad is not None
    twins.step(drawn(2, shapes))
    report = twins.ours.last_step
    assert report is not None
    assert report.duplicate
    assert twins.ours.version == 2
    twins.check()


def test_an_edit_survives_a_pull_that_failed(network: Network) -> None:
    """The parameters stay as they were edited when a pull is given up, and the next step begins there."""
    shapes = [(200, 300), (5,)]
    place: RemoteOptions = {"kernel": "reference", "server": network.url, "timeout_s": 1.0}
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, shapes))
    twins.train(1)
    for p in (twins.here[1], twins.there[1]):
        p.data.zero_()
    network.cut_response(after=150_000, then_down=True)
    with pytest.raises(Unavailable):
        twins.ours.pull()
    network.down = False
    twins.train(1, first=2)
    twins.check()


def test_a_pull_takes_edits_away(server: RunningServer) -> None:
    """It brings the session's parameters, whatever was written here."""
    (p,) = parameters(drawn(0, [(3, 2)]))
    before = p.detach().clone()
    optimizer = SGD([p], server=server.url)
    p.data.zero_()
    optimizer.pull()
    check_parameters([p], [before])


# -- the comparison itself -----------------------------------------------------------------------------------------


def addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_bits_are_compared() -> None:
    """Zeros of another sign and NaNs of another payload differ, and the same NaN does not."""
    p = torch.tensor([0.0, float("nan"), 1.0])
    tensors = [p, torch.empty(0)]
    edits = Edits(tensors, [p.clone(), torch.empty(0)])
    assert edits.found(addresses(tensors)) == []
    p.data[0] = -0.0
    assert edits.found(addresses(tensors)) == [0]
    p.data[0] = 0.0
    assert edits.found(addresses(tensors)) == []
    p.view(torch.int32)[1] += 1
    assert edits.found(addresses(tensors)) == [0]


def test_memory_that_was_exchanged_is_looked_at_again() -> None:
    """A tensor may become one of other strides or another dtype, and come back."""
    p = torch.arange(6.0).view(2, 3)
    tensors = [p]
    edits = Edits(tensors, [p.clone()])
    first = p.data
    p.data = torch.arange(6.0).view(3, 2).t()
    assert edits.found(addresses(tensors)) == [0]
    p.data = first.t().contiguous().t()
    assert edits.found(addresses(tensors)) == []
    p.data = first + 1
    assert edits.found(addresses(tensors)) == [0]
    p.data = first
    assert edits.found(addresses(tensors)) == []


def test_small_neighbours_are_compared_at_once_and_told_apart() -> None:
    """Large ones between small ones, dtypes side by side, empty ones: the ones that differ are found, and only they."""
    sizes = [3, 0, 5, 9000, 7, 1, 20_000, 4, 4]
    tensors = [torch.arange(float(size)) for size in sizes]
    flat = torch.cat(tensors)
    edits = Edits(tensors, list(torch.split(flat, sizes)))
    assert edits.found(addresses(tensors)) == []
    for changed in ([0], [2], [3], [4, 5], [6], [7, 8], [0, 3, 8]):
        for index in changed:
            tensors[index].data[-1] += 1
        assert edits.found(addresses(tensors)) == changed
        for index in changed:
            tensors[index].data[-1] -= 1
    assert edits.found(addresses(tensors)) == []
