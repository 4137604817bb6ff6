"""A farstep optimizer beside torch's own of the same name: equal parameters, equal gradients, compared bit by bit.

Gradients are drawn, not computed: the optimizers see the same ones whatever happens to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import farstep
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions

SHAPES: tuple[tuple[int, ...], ...] = ((7, 5), (5,), (), (0, 3), (2, 3, 4), (131,))

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
        start = drawn(0) if start is None else start
        options = {"foreach": False, **options}
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

    def train(self, steps: int, *, first: int = 1) -> None:
        """Take steps with gradients that are drawn."""
        for seed in range(first, first + steps):
            self.step(drawn(seed, [p.shape for p in self.here], self.here[0].dtype))

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
            check_equal([here["state"][index][key]], [value], exact=exact)
