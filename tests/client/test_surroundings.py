"""What torch is told for a whole script, or a `with` block, holds for the user's tensors and not for a session's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.errors import InvalidOption
from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import (
    check_parameters,
    check_states,
    gradients_of,
    ours,
    parameters,
    plain,
    start_of,
    theirs,
)
from tests.support.service.servers import RunningServer

Within = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def stepped(optimizer: torch.optim.Optimizer, ps: list[Tensor], gradients: list[Tensor]) -> None:
    for p, gradient in zip(ps, gradients, strict=True):
        p.grad = gradient

    optimizer.step(lambda: 1.0)


def trained(
    name: str, make: Callable[[list[Tensor]], torch.optim.Optimizer], within: tuple[Within, ...]
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Construct an optimizer in the first surroundings and take a step in each of the others, then edit and grow."""
    ps, late = parameters(start_of(name)), parameters(start_of(name)[:1])
    every = [gradients_of(name, seed, ps) for seed in range(1, len(within))]
    after = gradients_of(name, 9, [*ps, *late])
    with within[0]():
        optimizer = make(ps)
    for surroundings, gradients in zip(within[1:], every, strict=True):
        with surroundings():
            stepped(optimizer, ps, gradients)
        with torch.no_grad():
            ps[0].mul_(0.5)
    if name == "LBFGS":
        return ps, optimizer
    with within[-1]():
        optimizer.add_param_group({"params": late})
        stepped(optimizer, [*ps, *late], after)
    return [*ps, *late], optimizer


def compare(name: str, place: RemoteOptions, within: tuple[Within, ...], reference: tuple[Within, ...]) -> None:
    """Compare ours, trained in some surroundings, with torch's in others."""
    there, original = trained(name, lambda ps: theirs(name)(ps, **plain(name, {})), reference)
    here, optimizer = trained(name, lambda ps: ours(name)(ps, **plain(name, {}), **place), within)
    check_parameters(here, there)
    with within[-1]():
        state = optimizer.state_dict()
    check_states(state, original.state_dict())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_a_default_device_is_not_a_sessions(name: str, place: RemoteOptions) -> None:
    """`torch.set_default_device` decides nothing about tensors that a session makes; "meta" stands for any other."""

    def elsewhere() -> AbstractContextManager[None]:
        return default_device("meta")

    compare(name, place, (elsewhere,) * 3, (nullcontext,) * 3)


@pytest.mark.parametrize("options", [{"clip_norm": 0.1}, {"accumulate": 2}, {"ema": 0.9}], ids=str)
def test_nor_where_gradients_are_clipped_or_accumulated(options: RemoteOptions, place: RemoteOptions) -> None:
    """Policies compute where the gradients are, dense and sparse ones."""
    place = {**place, **options}
    results = []
    for surroundings in (nullcontext, lambda: default_device("meta")):
        for name in ("SGD", "SparseAdam"):
            make = lambda ps, name=name: ours(name)(ps, lr=0.1, **place)  # noqa: E731
            results.append(trained(name, make, (surroundings,) * 3)[0])
    check_parameters(results[2], results[0])
    check_parameters(results[3], results[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wire", [None, "bf16"])
def test_nor_on_the_wire(wire: Any, dtype: torch.dtype, server: RunningServer) -> None:
    """What arrives in 16 bits, and what is sent so, has the session's dtypes whatever torch's defaults are."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "wire": wire}
    results = []
    for surroundings in (nullcontext, lambda: default_device("meta"), lambda: default_dtype(dtype)):
        results.append(trained("Adamax", lambda ps: ours("Adamax")(ps, **place), (surroundings,) * 3)[0])
    check_parameters(results[1], results[0])
    check_parameters(results[2], results[0])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_default_dtype_means_what_it_means_to_torch(name: str, dtype: torch.dtype, place: RemoteOptions) -> None:
    """`torch.set_default_dtype` changes the dtype of torch's counters; where that changes a step, it is refused."""

    def other() -> AbstractContextManager[None]:
        return default_dtype(dtype)

    accepted = getattr(farstep.optim, name).counts_in
    if accepted is None or dtype in accepted:
        compare(name, place, (other,) * 3, (other,) * 3)
        return
    with pytest.raises(InvalidOption, match="default dtype"):
        compare(name, place, (nullcontext, other), (other, other))


INFERENCE: dict[str, tuple[Within, ...]] = {
    "construction": (torch.inference_mode, nullcontext, nullcontext),
    "a step": (nullcontext, torch.inference_mode, nullcontext),
    "everything": (torch.inference_mode, torch.inference_mode, torch.inference_mode),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("what", INFERENCE)
@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_leaves_nothing_behind(name: str, what: str, place: RemoteOptions) -> None:
    """Memory that a session takes inside `inference_mode` is written to outside of it, too."""
    compare(name, place, INFERENCE[what], (nullcontext,) * 3)


def test_one_step_inside_inference_mode_and_the_next_outside(place: RemoteOptions) -> None:
    """Gradients that autograd made outside are stepped on inside and then outside again, as torch does."""
    mine, torchs = parameters([torch.ones(4)]), parameters([torch.ones(4)])
    optimizer = farstep.optim.SGD(mine, lr=0.1, **place)
    twin = torch.optim.SGD(torchs, lr=0.1)
    for within in (torch.inference_mode, nullcontext, torch.inference_mode, nullcontext):
        for ps, either in ((mine, optimizer), (torchs, twin)):
            either.zero_grad()
            torch.autograd.backward((ps[0] ** 2).sum())
            with within():
                either.step()
    assert not any(p.is_inference() for p in mine)
    check_parameters(mine, torchs)
    optimizer.close()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.enable_grad, deterministic])
def test_modes_that_change_nothing(surroundings: Within, name: str, place: RemoteOptions) -> None:
    """Autograd on or off, and deterministic algorithms, give the bits of torch."""
    compare(name, place, (surroundings,) * 3, (surroundings,) * 3)


@pytest.mark.parametrize("wire", [None, "bf16"])
@pytest.mark.parametrize("size", [5, 1 << 21], ids=["small", "copied as it comes"])
def test_parameters_of_inference_mode(size: int, wire: Any, server: RunningServer) -> None:
    """Parameters that were made inside `inference_mode`, which can be written to there only, are stepped on there."""
    with torch.inference_mode():
        mine, torchs = [torch.ones(size)], [torch.ones(size)]
        optimizer = farstep.optim.SGD(mine, lr=0.5, server=server.url, kernel="reference", wire=wire)
        twin = torch.optim.SGD(torchs, lr=0.5)
        for _ in range(2):
            for ps, either in ((mine, optimizer), (torchs, twin)):
                ps[0].grad = torch.full((size,), 0.25)
                either.step()
        optimizer.pull()
        check_parameters(mine, torchs)
        optimizer.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_means_what_it_means_to_torch(name: str, dtype: torch.dtype, place: RemoteOptions) -> None:
    """A step inside `torch.autocast` is torch's; where torch multiplies in 16 bits and a server does not, refused."""

    def within() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=dtype)

    same = getattr(farstep.optim, name).same_in_autocast
    if same is None or dtype in same or "server" not in place:
        compare(name, place, (within,) * 3, (within,) * 3)
        return
    with pytest.raises(InvalidOption, match="autocast"):
        compare(name, place, (nullcontext, within), (within, within))
