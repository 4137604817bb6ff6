"""Workers that train in rounds, and the same training by plain torch in one place.

Gradients are drawn, by worker and local step, so that both see the same ones whatever happens to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import farstep
from farstep.local_sgd.rounds import Rounds
from farstep.settings import RemoteOptions
from tests.support.client.twins import drawn

SHAPES = ((4, 3), (3,), ())
EVERY = 3

Open = Callable[..., Rounds]
"""Return rounds for a model, its inner optimizer and a place."""


def local_sgd(model: nn.Module, inner: torch.optim.Optimizer, place: RemoteOptions, every: int = EVERY) -> Rounds:
    return farstep.LocalSGD(model, inner, every, **place)


def diloco(model: nn.Module, inner: torch.optim.Optimizer, place: RemoteOptions, every: int = EVERY) -> Rounds:
    return farstep.DiLoCo(model, inner, every=every, **place)


def model_of(seed: int = 0) -> nn.Module:
    """Return a model of a few parameters, one of which is frozen, and a buffer."""
    model = nn.Module()
    for number, values in enumerate(drawn(seed, SHAPES)):
        model.register_parameter(f"p{number}", nn.Parameter(values))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    model.register_buffer("seen", torch.full((2,), float(seed)))
    return model


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(worker: int, step: int) -> list[Tensor]:
    """Return the gradients of a worker's local step."""
    return drawn(1000 * worker + step + 1, SHAPES)


class Worker:
    """A model, its inner optimizer, and its rounds at a place.

    Attributes:
        taken: local steps so far.
    """

    def __init__(self, make: Open, place: RemoteOptions, number: int = 0, *, seed: int = 0, every: int = EVERY) -> None:
        self.number = number
        self.model = model_of(seed)
        self.inner: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, foreach=False)
        self.rounds = make(self.model, self.inner, {**place, "worker": f"w{number}"}, every)
        self.taken = 0

    @property
    def parameters(self) -> list[Tensor]:
        return parameters_of(self.model)

    @property
    def values(self) -> list[Tensor]:
        """Return a copy of what the parameters are now."""
        return [p.detach().clone() for p in self.parameters]

    def train(self, steps: int = 1) -> None:
        """Take local steps."""
        for _ in range(steps):
            for p, gradient in zip(self.parameters, gradients(self.number, self.taken), strict=True):
                p.grad = gradient
            self.taken += 1
            self.inner.step()


class Simulation:
    """The same training in one place: the formulas of the papers, in torch's own operations.

    Args:
        make: what it is compared with.
        workers: how many.
    """

    def __init__(self, make: Open, workers: int, *, every: int = EVERY, seed: int = 0) -> None:
        self.every = every
        self.bases = [nn.Parameter(each) for each in drawn(seed, SHAPES)]
        options = {"lr": 1.0} if make is local_sgd else {"lr": 0.7, "momentum": 0.9, "nesterov": True}
        self.outer = torch.optim.SGD(self.bases, foreach=False, **options)  # type: ignore[arg-type]
        self.models = [[nn.Parameter(each) for each in drawn(seed, SHAPES)] for _ in range(workers)]
        self.inners = [torch.optim.AdamW(each, lr=0.05, foreach=False) for each in self.models]
        self.taken = [0] * workers

    def local(self, worker: int, steps: int) -> None:
        """Take local steps of one worker."""
        for _ in range(steps):
            for p, gradient in zip(self.models[worker], gradients(worker, self.taken[worker]), strict=True):
                p.grad = gradient
            self.inners[worker].step()
            self.taken[worker] += 1

    @torch.no_grad()
    def delta(self, worker: int, base: Sequence[Tensor]) -> list[Tensor]:
        """Return a worker's pseudo-gradient against the parameters that its round began with."""
        return [b - p for b, p in zip(base, self.models[worker], strict=True)]

    @torch.no_grad()
    def step(self, deltas: Sequence[Sequence[Tensor]]) -> None:
        """Step the outer optimizer along the mean of pseudo-gradients, summed in the order given."""
        for b, each in zip(self.bases, zip(*deltas, strict=True), strict=True):
            b.grad = sum(each[1:], start=each[0]) / len(each)
        self.outer.step()

    @torch.no_grad()
    def take(self, worker: int) -> list[Tensor]:
        """Bring one worker's model to the global parameters, and return a copy of them."""
        for p, b in zip(self.models[worker], self.bases, strict=True):
            p.copy_(b)
        return [b.detach().clone() for b in self.bases]

    def round(self) -> None:
        """Let all workers take a round's local steps, and synchronise."""
        everyone = range(len(self.models))
        for worker in everyone:
            self.local(worker, self.every)
        self.step([self.delta(worker, self.bases) for worker in everyone])
        for worker in everyone:
            self.take(worker)
