"""A farstep optimizer beside torch's own of the same name: equal parameters, equal gradients, compared bit by bit.

Gradients are drawn, not computed: the optimizers see the same ones whatever happens to the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import farstep
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions

SHAPES: tuple[tuple[int, ...], ...] = ((7, 5), (5,), (), (0, 3), (2, 3, 4), (131,))

FITTING: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "Adafactor": ((7, 5), (5,), (), (1, 3), (2, 3, 4), (131,)),  # torch divides by the number of elements
    "Muon": ((7, 5), (5, 9), (1, 1), (0, 3), (24, 33), (131, 2)),
    "SparseAdam": ((7, 5), (5,), (1,), (0, 3), (2, 3, 4), (131,)),
}
"""Shapes for optimizers that do not take all of `SHAPES`."""

Group = dict[str, Any]
Grouping = Callable[[list[Tensor]], list[Group]]


def ours(name: str) -> Callable[..., RemoteOptimizer]:
    """Return farstep's class of a name."""
    kind: Callable[..., RemoteOptimizer] = getattr(farstep.optim, name)
    return kind


def theirs(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return torch's class of a name."""
    kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    return kind


def drawn(
    seed: int, shapes: Iterable[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[Tensor]:
    """Return normally distributed tensors, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(tuple(shape), generator=generator, dtype=dtype) for shape in shapes]


def start_of(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return first values of parameters that an optimizer takes."""
    return drawn(0, FITTING.get(name, SHAPES), dtype)


def gradients_of(name: str, seed: int, like: Iterable[Tensor]) -> list[Tensor]:
    """Return gradients in the form that an optimizer takes, the same for the same seed."""
    like = list(like)
    gradients = drawn(seed, [p.shape for p in like], like[0].dtype)
    return [some_rows(g, seed) for g in gradients] if name == "SparseAdam" else gradients


def some_rows(gradient: Tensor, seed: int) -> Tensor:
    """Return two thirds of the rows of a gradient, other ones for each seed, as a sparse gradient."""
    rows = torch.arange(gradient.shape[0])
    rows = rows[(rows + seed) % 3 != 0]
    return torch.sparse_coo_tensor(rows.unsqueeze(0), gradient[rows], gradient.shape, check_invariants=True).coalesce()


def plain(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with torch's plain implementation, where there is a choice."""
    return {"foreach": False, **options} if "foreach" in inspect.signature(theirs(name)).parameters else {**options}


def parameters(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return copies to be optimized."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def one_group(ps: list[Tensor]) -> list[Group]:
    return [{"params": ps}]


class Twins:
    """Two optimizers over equal parameters that take the same steps.

    Args:
        name: which optimizer.
        options: torch's own.
        place: farstep's own.
        grouping: cuts the parameters into groups.
        start: the first values of the parameters.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        place: RemoteOptions,
        *,
        grouping: Grouping = one_group,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        start = start_of(name) if start is None else start
        options = plain(name, options)
        self.name = name
        self.here, self.there = parameters(start), parameters(start)
        self.ours = ours(name)(grouping(self.here), **options, **place)
        self.theirs = theirs(name)(grouping(self.there), **options)

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients of both."""
        for p, q, gradient in zip(self.here, self.there, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
            q.grad = None if gradient is None else gradient.clone()

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Take one step with both."""
        self.give(gradients)
        self.ours.step()
        self.theirs.step()

    def drawn(self, seed: int) -> list[Tensor]:
        """Return gradients for both."""
        return gradients_of(self.name, seed, self.here)

    def train(self, steps: int, *, first: int = 1) -> None:
        """Take steps with gradients that are drawn."""
        for seed in range(first, first + steps):
            self.step(self.drawn(seed))

    def check(self, *, exact: bool = True) -> None:
        """Compare parameters and state_dicts."""
        check_parameters(self.here, self.there, exact=exact)
        check_states(self.ours.state_dict(), self.theirs.state_dict(), exact=exact)


HALVES = {torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
"""torch's relative tolerance; as absolute one the unit in the last place of 1, for what lies near zero."""


def check_equal(here: Sequence[Tensor], there: Sequence[Tensor], *, exact: bool = True) -> None:
    """Compare tensors: value, shape, dtype, device; bit by bit, or within torch's tolerance for the dtype."""
    rtol, atol = (0.0, 0.0) if exact else (None, None)
    if not exact and here[0].dtype in HALVES:
        rtol, atol = HALVES[here[0].dtype], torch.finfo(here[0].dtype).eps
    torch.testing.assert_close(here, there, rtol=rtol, atol=atol, equal_nan=True)


def check_parameters(here: Sequence[Tensor], there: Sequence[Tensor], *, exact: bool = True) -> None:
    """Compare parameters of both."""
    check_equal([p.detach() for p in here], [q.detach() for q in there], exact=exact)


def check_states(here: dict[str, Any], there: dict[str, Any], *, exact: bool = True) -> None:
    """Compare two state_dicts: groups, keys, values, dtypes, devices."""
    assert here["param_groups"] == there["param_groups"]
    assert here.keys() == there.keys()
    assert here["state"].keys() == there["state"].keys()
    for index, own in there["state"].items():
        assert here["state"][index].keys() == own.keys()
        for key, value in own.items():
            check_value(here["state"][index][key], value, exact=exact)


def check_value(here: Any, there: Any, *, exact: bool = True) -> None:
    """Compare one value of a state; what torch keeps sparse is dense in a session."""
    assert type(here) is type(there)
    if isinstance(there, Tensor):
        check_equal([here], [there.to_dense() if there.is_sparse else there], exact=exact)
    else:
        assert here == there
