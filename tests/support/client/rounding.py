"""Trainings with 16 bits on the wire beside torch's with rounded gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import farstep
from farstep.protocol.codecs import Wire
from farstep.settings import RemoteOptions
from tests.support.client.twins import check_parameters, parameters
from tests.support.service.servers import RunningServer

SHAPES: list[tuple[int, ...]] = [(7, 5), (5,), (), (0, 3), (2, 3, 4), (131,)]
WIRES = [Wire(gradients="bf16", parameters="bf16"), Wire(gradients="fp16", parameters="fp16")]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ONE_WAY = [Wire(gradients="bf16"), Wire(parameters="bf16"), Wire(gradients="fp16", parameters="bf16")]


def rounded(tensor: Tensor, half: str | None) -> Tensor:
    """Return a tensor as it is after the wire: float32 through 16 bits, others as they are."""
    if half is None or tensor.dtype is not torch.float32:
        return tensor
    return tensor.to(HALVES[half]).to(tensor.dtype)


class Rounded:
    """An optimizer with 16 bits on its wire beside torch's, whose gradients are rounded here.

    Args:
        start: the first values of the parameters.
    """

    def __init__(self, place: RemoteOptions, wire: Wire, start: Sequence[Tensor], name: str = "Adagrad") -> None:
        self.wire = wire
        self.here, self.there = parameters(start), parameters(start)
        self.ours = getattr(farstep.optim, name)(self.here, lr=0.1, wire=wire, **place)
        self.theirs = getattr(torch.optim, name)(self.there, lr=0.1, **({} if name == "SparseAdam" else PLAIN))

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Take one step with both."""
        for p, q, gradient in zip(self.here, self.there, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
            q.grad = None if gradient is None else rounded(gradient, self.wire.gradients)
        self.ours.step()
        self.theirs.step()

    def train(self, steps: int, *, first: int = 1) -> None:
        """Take steps with gradients that are drawn."""
        for seed in range(first, first + steps):
            self.step(like(self.here, seed))

    def check(self) -> None:
        """Compare what the worker has with torch's parameters, rounded; nothing of it counts as edited."""
        check_parameters(self.here, [rounded(q.detach(), self.wire.parameters) for q in self.there])
        assert self.edited() == []

    def check_session(self, server: RunningServer) -> None:
        """Compare what the session has with torch's parameters: another worker brings it as it is."""
        there = parameters(torch.zeros_like(q) for q in self.there)
        other = type(self.ours)(there, lr=0.1, server=server.url, session=self.ours.session, kernel="reference")
        check_parameters(there, self.there)
        other.close()

    def edited(self) -> list[int]:
        return self.ours._membership.link.edited([p.data_ptr() for p in self.here])


PLAIN = {"foreach": False}


def like(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return normally distributed gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in tensors]


def at(place: RemoteOptions, **changes: Any) -> RemoteOptions:
    """Return a place with other options beside."""
    return {**place, **changes}  # type: ignore[typeddict-item]
