"""Workers whose gradients a `GradScaler` scales, and gradients that overflow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler

from farstep.settings import RemoteOptions
from tests.support.client.twins import drawn
from tests.support.client.workers import Worker

SCALE = 2.0**10
BAD = 3
"""The step whose gradients overflow."""


def scaler_(scale: float = SCALE) -> GradScaler:
    return GradScaler(device="cpu", init_scale=scale, growth_interval=3)


class Scaled(Worker):
    """A worker of a sync session with a scaler of its own."""

    def __init__(
        self, place: RemoteOptions, name: str, *, scale: float = SCALE, clip: bool = False, informed: bool = False
    ) -> None:
        super().__init__(place, name)
        self.scaler, self._clip = scaler_(scale), clip
        if informed:
            self.optimizer.inform(self.scaler)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Come by these gradients as a loss's, and step."""
        self.optimizer.zero_grad()
        terms: list[Tensor] = [(p * g).sum() for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        torch.autograd.backward(self.scaler.scale(torch.stack(terms).sum()))
        self.try_()

    def try_(self) -> None:
        if self._clip:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def applied(self) -> bool:
        report = self.optimizer.last_step
        assert report is not None
        return report.applied


def overflowing(seed: int) -> list[Tensor]:
    gradients = drawn(seed)
    gradients[0][0, 0] = float("inf")
    return gradients
