"""Ways to train: which parameters there are, how they are grouped, and what happens in a step.

An optimizer of ours and torch's own each go the same way alone, over parameters of their own. Gradients are drawn, the
same for the same step, so that they do not depend on what the optimizers did before; only `Closure` computes them, as
an optimizer that evaluates the loss itself has to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, final
from zlib import crc32

import torch
from torch import Tensor

Group = dict[str, Any]

Start = Callable[[torch.dtype], list[Tensor]]

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0, 3), (131,), (33, 17), (2, 3, 4, 5))
"""A scalar, one element, none, a vector, a matrix and four dimensions."""
ROWS: tuple[tuple[int, ...], ...] = ((23, 5), (11, 3))
"""What sparse gradients belong to."""


@lru_cache(maxsize=4096)
def drawn(shape: tuple[int, ...], dtype: torch.dtype, *seed: int) -> Tensor:
    """Return normal noise, the same for the same seed; in half precision, rounded from single. Not to be written to."""
    generator = torch.Generator().manual_seed(crc32(repr((shape, seed)).encode()))
    if dtype in (torch.float16, torch.bfloat16):
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randn(shape, dtype=dtype, generator=generator)


def contiguous(dtype: torch.dtype) -> list[Tensor]:
    """Return parameters of every shape."""
    return [drawn(shape, dtype, 0, index).clone() for index, shape in enumerate(SHAPES)]


def of_any_kind(dtype: torch.dtype) -> list[Tensor]:
    """Return parameters of every shape, a transposed matrix and a column of a larger tensor."""
    return [*contiguous(dtype), drawn((13, 7), dtype, 0, 98).clone().t(), drawn((29, 3), dtype, 0, 99).clone()[:, 1]]


def not_empty(dtype: torch.dtype) -> list[Tensor]:
    """Return parameters of every shape that has elements."""
    return [each for each in contiguous(dtype) if each.numel()]


def strided(dtype: torch.dtype) -> list[Tensor]:
    """Return a transposed matrix and a column of a larger tensor."""
    return of_any_kind(dtype)[-2:]


def matrices(dtype: torch.dtype) -> list[Tensor]:
    """Return matrices only, one of them transposed."""
    usual = [drawn(shape, dtype, 0, index).clone() for index, shape in enumerate(((1, 1), (33, 17), (5, 40), (16, 16)))]
    return [*usual, drawn((13, 7), dtype, 0, 98).clone().t()]


def embeddings(dtype: torch.dtype) -> list[Tensor]:
    """Return matrices whose rows are looked up."""
    return [drawn(shape, dtype, 0, index).clone() for index, shape in enumerate(ROWS)]


def embeddings_and_a_vector(dtype: torch.dtype) -> list[Tensor]:
    """Return matrices whose rows are looked up, and what gets dense gradients beside them."""
    return [*embeddings(dtype), drawn((7,), dtype, 0, 97).clone()]


@dataclass(frozen=True)
class Way:
    """One parameter group, a gradient for every parameter in every step.

    Attributes:
        start: returns the first values of the parameters.
        label: names the way in tables; empty for this one.
    """

    start: Start = of_any_kind
    label: ClassVar[str] = ""

    def parameters(self, dtype: torch.dtype) -> list[Tensor]:
        """Return fresh parameters."""
        return [tensor.requires_grad_() for tensor in self.start(dtype)]

    def groups(self, ps: Sequence[Tensor]) -> list[Group]:
        """Return the param groups."""
        return [{"params": list(ps)}]

    def gradient(self, p: Tensor, step: int, index: int) -> Tensor | None:
        """Return what a parameter gets in a step, counted from 1."""
        return drawn(tuple(p.shape), p.dtype, step, index).clone()

    def step(self, optimizer: torch.optim.Optimizer, ps: Sequence[Tensor], step: int) -> object:
        """Take a step and return what the optimizer returned."""
        for index, p in enumerate(ps):
            p.grad = self.gradient(p, step, index)
        returned: object = optimizer.step()
        return returned


@final
@dataclass(frozen=True)
class Groups(Way):
    """Three groups, each with options of its own."""

    label: ClassVar[str] = "three groups"

    def groups(self, ps: Sequence[Tensor]) -> list[Group]:
        return [
            {"params": list(ps[:3]), "lr": 0.3, "weight_decay": 0.05},
            {"params": list(ps[3:5])},
            {"params": list(ps[5:]), "lr": 0.05, "maximize": True},
        ]


@final
@dataclass(frozen=True)
class Missing(Way):
    """Gradients that come and go, and one that never comes."""

    label: ClassVar[str] = "missing gradients"

    def gradient(self, p: Tensor, step: int, index: int) -> Tensor | None:
        missing = (step + 2 * index) % 5 == 0 or index == 4 or step == 7
        return None if missing else super().gradient(p, step, index)


@final
@dataclass(frozen=True)
class Changed(Way):
    """A learning rate that a schedule changes with every step, other options that change midway."""

    label: ClassVar[str] = "options changed midway"

    def step(self, optimizer: torch.optim.Optimizer, ps: Sequence[Tensor], step: int) -> object:
        (group,) = optimizer.param_groups
        group["lr"] = 0.1 / (1 + 0.1 * step)
        if step == 3 and "weight_decay" in group:
            group["weight_decay"] = 0.02
        if step == 5 and "maximize" in group:
            group["maximize"] = True
        return super().step(optimizer, ps, step)


@final
@dataclass(frozen=True)
class Sparse(Way):
    """Gradients of embeddings: rows in any order, some named twice, none at all in one step.

    Attributes:
        coalesced: each row is named once, in order.
    """

    start: Start = embeddings_and_a_vector
    coalesced: bool = False
    label: ClassVar[str] = "sparse gradients"

    def gradient(self, p: Tensor, step: int, index: int) -> Tensor | None:
        """Return a sparse gradient for a matrix, a dense one for a vector."""
        if p.dim() == 1:
            return super().gradient(p, step, index)
        count = 0 if step == 4 else 9
        rows = torch.randint(p.shape[0], (1, count), generator=torch.Generator().manual_seed(step * 10 + index))
        values = drawn((count, p.shape[1]), p.dtype, step, index)
        sparse = torch.sparse_coo_tensor(rows, values, tuple(p.shape), check_invariants=True)
        return sparse.coalesce() if self.coalesced else sparse


@final
@dataclass(frozen=True)
class Closure(Way):
    """The optimizer evaluates the loss itself, as often as it likes."""

    label: ClassVar[str] = "closure"

    def step(self, optimizer: torch.optim.Optimizer, ps: Sequence[Tensor], step: int) -> object:
        goals = [drawn(tuple(p.shape), p.dtype, -1, index) for index, p in enumerate(ps)]

        def closure() -> float:
            optimizer.zero_grad()
            apart = [(p - goal).abs().square() for p, goal in zip(ps, goals, strict=True)]
            loss = torch.stack([(each / (1 + i) + 0.1 * each.square()).sum() for i, each in enumerate(apart)]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss  # type: ignore[return-value]

        return optimizer.step(closure)
