"""Trainings that are done twice, with pushes that begin during the backward pass and with torch; the bits are equal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import farstep
from farstep.http_link import HttpLink
from farstep.optim import RemoteOptimizer
from farstep.protocol.receipt import StepReport
from farstep.settings import RemoteOptions
from tests.support.client.twins import check_parameters, check_states

WIDTH = 160
"""A matrix of this width is more than the least that a push is begun early for."""
WITHIN_S = 30.0


class Net(nn.Module):
    """A network with a shared matrix, and one that is used in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.shared, self.seldom = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 10)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))

    def forward(self, inputs: Tensor, *, seldom: bool = False) -> Tensor:
        x = self.shared(torch.tanh(self.shared(torch.tanh(self.inner(inputs)))))
        return torch.as_tensor(self.head(self.seldom(x) if seldom else x))


def loss_of(network: Net, seed: int, *, seldom: bool = False) -> Tensor:
    """Return a loss on data that is drawn, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, WIDTH, generator=generator)
    classes = torch.randint(10, (8,), generator=generator)
    return nn.functional.cross_entropy(network(inputs, seldom=seldom), classes)


def backward(network: Net, seed: int, **options: Any) -> None:
    """Compute gradients, added to those that are there."""
    torch.autograd.backward(loss_of(network, seed, **options))


Step = Callable[[Net, torch.optim.Optimizer, int], None]
"""Take one step of a training; it is the same for both optimizers."""


def plain(network: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take an ordinary step."""
    optimizer.zero_grad()
    backward(network, seed)
    optimizer.step()


def wait_until_sent(optimizer: torch.optim.Optimizer) -> None:
    """Wait until a stream, if there is one, holds all gradients, so that what is done to them next comes too late."""
    if isinstance(optimizer, RemoteOptimizer):
        link = optimizer._membership.link
        assert isinstance(link, HttpLink)
        begun = link._overlapping._current
        if begun is not None:
            with begun._moved:
                assert begun._moved.wait_for(lambda: begun._over or begun._filled == len(begun._units), WITHIN_S)


class Both:
    """The same training with farstep's optimizer and with torch's.

    Args:
        server: the server's URL.
        name: which optimizer.
        prepare: called with each network before its optimizer is made.
        remote: further options of farstep.
    """

    def __init__(
        self, server: str, name: str = "Adagrad", *, prepare: Callable[[Net], None] | None = None, **remote: object
    ) -> None:
        place: RemoteOptions = {"server": server, "kernel": "reference", "overlap": True, **remote}  # type: ignore[typeddict-item]
        self.here, self.there = Net(), Net()
        if prepare is not None:
            prepare(self.here)
            prepare(self.there)
        self.ours: RemoteOptimizer = getattr(farstep.optim, name)(
            self.here.parameters(), lr=0.05, foreach=False, **place
        )
        self.theirs: torch.optim.Optimizer = getattr(torch.optim, name)(self.there.parameters(), lr=0.05, foreach=False)
        self.steps = 0

    def step(self, how: Step = plain) -> StepReport:
        """Take one step with both, and return what ours says of it.

        The thread of a stream that was given up may be at work a while longer, and nothing is streamed until it ends.
        """
        self.steps += 1
        link = self.ours._membership.link
        assert isinstance(link, HttpLink)
        if link._overlapping._current is None and link._overlapping._last is not None:
            link._overlapping._last.join(WITHIN_S)
        how(self.here, self.ours, self.steps)
        how(self.there, self.theirs, self.steps)
        report = self.ours.last_step
        assert report is not None
        return report

    def train(self, count: int, how: Step = plain) -> list[str]:
        """Take steps and return what became of their streams."""
        return [self.step(how).overlap for _ in range(count)]

    def check(self, *, versions: int | None = None) -> None:
        """Compare parameters and state, and the count of versions with that of steps."""
        check_parameters([*self.here.parameters()], [*self.there.parameters()])
        check_states(self.ours.state_dict(), self.theirs.state_dict())
        assert self.ours.version == (self.steps if versions is None else versions)


def hooks_of(network: nn.Module) -> int:
    """Return how many hooks there are on the parameters."""
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in network.parameters())


def senders() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("farstep-push")]
