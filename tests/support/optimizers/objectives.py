"""Objectives for optimizers that ask for them again and again: each is a list of parameters and a closure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]


@dataclass
class Objective:
    """Parameters, and a closure that returns the loss and sets their gradients.

    Attributes:
        parameters: what is optimized.
        closure: as `step` takes it.
        evaluations: how often the closure was called.
    """

    parameters: list[Tensor]
    loss: Closure
    evaluations: int = 0

    def closure(self) -> Tensor:
        self.evaluations += 1
        for p in self.parameters:
            p.grad = None
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _noise(seed: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def quadratic(dtype: torch.dtype) -> Objective:
    """Return an ill-conditioned quadratic over five tensors of odd sizes, one of them without any gradient."""
    shapes = [(7, 5), (3,), (), (131,), (2, 3)]
    ps = [p.requires_grad_() for p in _noise(0, shapes, dtype)]
    scales = [each.exp() for each in _noise(1, shapes, dtype)]
    targets = _noise(2, shapes, dtype)

    def loss() -> Tensor:
        terms = [(s * (p - t) ** 2).sum() for p, s, t in zip(ps[:4], scales, targets, strict=False)]
        return torch.stack(terms).sum()

    return Objective(ps, loss)


def rosenbrock(dtype: torch.dtype) -> Objective:
    """Return the banana valley, from its usual start; searches bracket and zoom there."""
    p = torch.tensor([-1.2, 1.0, -0.7, 2.0], dtype=dtype, requires_grad=True)
    return Objective([p], lambda: (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum())


def network(dtype: torch.dtype) -> Objective:
    """Return the loss of a small network."""
    weights = [p.requires_grad_() for p in _noise(3, [(9, 6), (9,), (1, 9), (1,)], dtype)]
    x, y = _noise(4, [(40, 6), (40, 1)], dtype)

    def loss() -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, weights[0], weights[1]))
        return ((nn.functional.linear(hidden, weights[2], weights[3]) - y) ** 2).mean()

    return Objective(weights, loss)


def cliff(dtype: torch.dtype) -> Objective:
    """Return a narrow valley with a steep wall, where searches find brackets and interpolate out of bounds."""
    p = torch.tensor([3.0, -2.0, 0.5], dtype=dtype, requires_grad=True)
    return Objective([p], lambda: (p**4).sum() + torch.exp(2 * p).sum() - 3 * p[0] * p[1] + torch.sin(9 * p).sum())


def slope(dtype: torch.dtype) -> Objective:
    """Return an objective that falls for ever, so that searches go on to their last evaluation."""
    p = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    return Objective([p], lambda: -p.sum())


def ripples(dtype: torch.dtype) -> Objective:
    """Return a bowl full of ripples, where brackets turn around and interpolations run uphill."""
    p = torch.tensor([3.0, -2.0, 0.5, 1.7, -0.3], dtype=dtype, requires_grad=True)
    return Objective([p], lambda: (p**2).sum() + 5 * torch.sin(40 * p).sum())


def spiral(dtype: torch.dtype) -> Objective:
    """Return an objective of complex and real parameters."""
    complex_dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
    (a,) = _noise(5, [(3,)], dtype)
    (z,) = _noise(6, [(2, 2)], complex_dtype)
    ps = [a.requires_grad_(), z.requires_grad_()]
    return Objective(ps, lambda: (ps[0] ** 2).sum() + (ps[1] * (1 + 2j) - 3).abs().pow(2).sum())


OBJECTIVES = [quadratic, rosenbrock, network, cliff, slope, ripples, spiral]
