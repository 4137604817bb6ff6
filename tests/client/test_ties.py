"""Parameters that share memory: torch steps on them one after the other, so ours refuses, or holds one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.settings import RemoteOptions
from farstep.tensors import overlapping, shares_with_itself
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, drawn, ours, parameters
from tests.support.service.servers import RunningServer

SHAPES = ((4, 4), (4, 4), (5, 3))
Tie = Callable[[Tensor, Tensor], None]


def whole(p: Tensor, q: Tensor) -> None:
    q.data = p.data


def transposed(p: Tensor, q: Tensor) -> None:
    q.data = p.data.t()


def a_part(p: Tensor, q: Tensor) -> None:
    flat = torch.cat([p.data.reshape(-1), torch.zeros(12)])
    p.data, q.data = flat[:16].view(4, 4), flat[12:].view(4, 4)


def one_element(p: Tensor, q: Tensor) -> None:
    flat = torch.zeros(40)
    p.data, q.data = flat.as_strided((4, 4), (8, 2), 0), flat[24:].view(4, 4)


TIES: tuple[Tie, ...] = (whole, transposed, a_part, one_element)


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "SparseAdam"])
def test_the_first_step_refuses_and_names_both(name: str, tie: Tie, place: RemoteOptions) -> None:
    """Tied before the optimizer is made, or after some steps: the step is refused, and nothing has changed."""
    for late in (False, True):
        ps = parameters(drawn(0, SHAPES))
        if not late:
            tie(ps[0], ps[1])
        optimizer = ours(name)([("first", ps[0]), ("second", ps[1]), ("third", ps[2])], **place)
        if late:
            for p, gradient in zip(ps, drawn(1, SHAPES), strict=True):
                p.grad = gradient
            optimizer.step(lambda: 1.0)
            tie(ps[0], ps[1])
        before = [p.detach().clone() for p in ps]
        version = optimizer.version
        for p, gradient in zip(ps, drawn(2, SHAPES), strict=True):
            p.grad = gradient
        with pytest.raises(TensorMismatch, match="'first' and 'second' share memory"):
            optimizer.step(lambda: 1.0)
        optimizer.state_dict()
        assert optimizer.version == version
        assert all(map(torch.equal, ps, before))
        ps[1].data = ps[1].data.clone(memory_format=torch.contiguous_format)
        optimizer.step(lambda: 1.0)
        assert optimizer.version > version
        optimizer.close()


def test_what_torch_does_with_them() -> None:
    """Torch's second parameter steps from where the first one came to, which the refusal speaks of."""
    a, b = parameters([torch.zeros(1), torch.zeros(1)])
    b.data = a.data
    a.grad, b.grad = torch.ones(1), torch.full((1,), 10.0)
    torch.optim.SGD([a, b], lr=1.0).step()
    assert a.item() == b.item() == -11.0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("SparseAdam", "LBFGS")])
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_that_is_frozen_follows_the_other(frozen: int, name: str, place: RemoteOptions) -> None:
    """A parameter that requires no gradient and shares another's memory is not in the session: torch's bits."""
    twins = Twins(name, {}, place, start=drawn(0, SHAPES[2:]))
    twins.ours.close()
    for optimizers, ps in ((0, twins.here), (1, twins.there)):
        tied = ps[0].data.t().requires_grad_(False)
        ps.insert(frozen, tied)
        kind = type(twins.theirs) if optimizers else type(twins.ours)
        options: dict[str, Any] = {} if optimizers else dict(place)
        if "foreach" in twins.theirs.defaults:
            options["foreach"] = False
        made = kind(ps, **options)
        if optimizers:
            twins.theirs = made
        else:
            twins.ours = made  # type: ignore[assignment]
    for seed in range(3):
        gradients: list[Tensor | None] = [*drawn(seed, SHAPES[2:])]
        gradients.insert(frozen, None)
        twins.step(gradients)
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("private", [True, False])
def test_a_model_that_is_tied_anew_by_assignment(private: bool, server: RunningServer) -> None:
    """`load_state_dict(assign=True)` makes two parameters of one; the optimizer made after it refuses to step."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    kept = model.state_dict()
    place: RemoteOptions = {"server": server.url}
    if not private:
        place["session"] = "tied-anew"
    optimizer = ours("Adam")(model.parameters(), **place)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    model.load_state_dict(kept, assign=True)
    assert len(list(model.parameters())) == 4
    optimizer.close()
    again: RemoteOptions = {"server": server.url}
    optimizer = ours("Adam")(model.named_parameters(), **again)
    model(torch.ones(3)).sum().backward()
    with pytest.raises(TensorMismatch, match=r"'0\.weight' and '1\.weight'"):
        optimizer.step()
    optimizer.close()


def test_neighbours_share_nothing(place: RemoteOptions) -> None:
    """Columns of one matrix, and views side by side in one buffer, are parameters like any others."""

    def columns(ps: list[Tensor]) -> list[dict[str, Any]]:
        buffer = torch.zeros(5, 2)
        flat = torch.zeros(20)
        for index, p in enumerate(ps[:2]):
            buffer[:, index] = p.data
            p.data = buffer[:, index]
        for index, p in enumerate(ps[2:]):
            flat[10 * index : 10 * index + 10] = p.data
            p.data = flat[10 * index : 10 * index + 10]
        return [{"params": ps}]

    twins = Twins("Adamax", {}, place, start=drawn(0, [(5,), (5,), (10,), (10,)]), grouping=columns)
    twins.train(3)
    twins.check()
    twins.ours.close()


def places_of(view: Tensor) -> list[int]:
    """Return which bytes a view's elements take, one by one."""
    size, begin = view.element_size(), view.untyped_storage().data_ptr()
    if not view.numel():
        return []
    numbers = torch.arange(view.untyped_storage().nbytes() // size)
    chosen = numbers.as_strided(view.shape, view.stride(), view.storage_offset()).reshape(-1)
    return [begin + size * element + byte for element in chosen.tolist() for byte in range(size)]


@pytest.mark.parametrize("seed", range(200))
def test_what_shares_an_element(seed: int) -> None:
    """Views drawn at random, of any strides and three dtypes: found are those with an element in common, no others."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    buffer = torch.zeros(64)
    views: list[Tensor] = []
    while len(views) < 4:
        base = buffer.view([torch.float32, torch.float64, torch.int16][number(0, 2)])
        dims = number(0, 3)
        shape = [number(1, 4) for _ in range(dims)]
        strides = [number(0 if number(0, 9) == 0 else 1, 7) for _ in range(dims)]
        room = base.numel() - 1 - sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if room >= 0:
            views.append(base.as_strided(shape, strides, number(0, room)))
    views.append(buffer[:0])
    taken = [places_of(view) for view in views]
    assert [shares_with_itself(view) for view in views] == [len(set(each)) < len(each) for each in taken]
    chosen = [place for place in range(len(views)) if not shares_with_itself(views[place])]
    found = overlapping([views[place] for place in chosen])
    sets = [set(taken[place]) for place in chosen]
    assert all(sets[one] & sets[other] for one, other in found)
    assert {other for _, other in found} == {j for j in range(len(sets)) if any(sets[i] & sets[j] for i in range(j))}
