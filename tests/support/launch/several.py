"""Scripts with several optimizers, as people write them: trained by farstep where this is run, by torch in a test.

    python several.py gan          a generator and a discriminator
    python several.py actor_critic an actor and a critic of the same shapes
    python several.py sac          an actor, two critics of the same shapes, and a temperature

Each worker has the same data, so the mean of their gradients is the gradient of one, and any number of workers comes to
the parameters of plain torch in one process, bit for bit.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS = 5
Make = Callable[[str, Iterable[Tensor], float], torch.optim.Optimizer]
"""Given what it is for, parameters and a rate, returns an optimizer."""


def model(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def digest(*parts: nn.Module | Tensor) -> str:
    """Return a name for exactly these values."""
    tensors = [p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])]
    numbers = torch.cat([p.detach().reshape(-1) for p in tensors])
    return hashlib.sha256(str(numbers.view(torch.int32).tolist()).encode()).hexdigest()[:16]


def gan(make: Make) -> str:
    """Train a generator against a discriminator of other shapes."""
    torch.manual_seed(0)
    generator, discriminator = model(3, 8, 2), model(2, 8, 1)
    of_generator = make("generator", generator.parameters(), 2e-3)
    of_discriminator = make("discriminator", discriminator.parameters(), 1e-3)
    loss = functional.binary_cross_entropy_with_logits
    for _ in range(STEPS):
        real, noise = torch.randn(16, 2) + 2, torch.randn(16, 3)
        of_discriminator.zero_grad()
        there, made = discriminator(real), discriminator(generator(noise).detach())
        (loss(there, torch.ones(16, 1)) + loss(made, torch.zeros(16, 1))).backward()  # type: ignore[no-untyped-call]
        of_discriminator.step()
        of_generator.zero_grad()
        loss(discriminator(generator(noise)), torch.ones(16, 1)).backward()  # type: ignore[no-untyped-call]
        of_generator.step()
    return digest(generator, discriminator)


def actor_critic(make: Make) -> str:
    """Train an actor and a critic of the same shapes, which a shared session would take for one model."""
    torch.manual_seed(1)
    actor, critic = model(4, 8, 2), model(4, 8, 2)
    of_actor, of_critic = make("actor", actor.parameters(), 1e-3), make("critic", critic.parameters(), 1e-3)
    for _ in range(STEPS):
        state, reward = torch.randn(16, 4), torch.randn(16, 2)
        values = critic(state)
        of_critic.zero_grad()
        functional.mse_loss(values, reward).backward()  # type: ignore[no-untyped-call]
        of_critic.step()
        of_actor.zero_grad()
        (-(functional.log_softmax(actor(state), 1) * (reward - values.detach())).mean()).backward()
        of_actor.step()
    return digest(actor, critic)


def sac(make: Make) -> str:
    """Train a soft actor, two critics and the logarithm of a temperature, each by an optimizer of its own."""
    torch.manual_seed(2)
    actor, critics = model(4, 8, 2), [model(6, 8, 1), model(6, 8, 1)]
    log_alpha = torch.zeros((), requires_grad=True)
    of_actor = make("actor", actor.parameters(), 3e-4)
    of_critics = [make(f"critic{i}", critic.parameters(), 1e-3) for i, critic in enumerate(critics)]
    of_alpha = make("alpha", [log_alpha], 1e-2)
    for _ in range(STEPS):
        state, action, target = torch.randn(16, 4), torch.randn(16, 2), torch.randn(16, 1)
        for critic, optimizer in zip(critics, of_critics, strict=True):
            optimizer.zero_grad()
            functional.mse_loss(critic(torch.cat([state, action], 1)), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        chosen = actor(state) + 0.1 * torch.randn(16, 2)
        entropy = chosen.pow(2).sum(1).mean()
        value = torch.min(*(critic(torch.cat([state, chosen], 1)) for critic in critics)).mean()
        of_actor.zero_grad()
        (log_alpha.exp().detach() * entropy - value).backward()
        of_actor.step()
        of_alpha.zero_grad()
        (-log_alpha * (entropy.detach() - 1)).backward()
        of_alpha.step()
    return digest(actor, *critics, log_alpha)


SCRIPTS: dict[str, Callable[[Make], str]] = {"gan": gan, "actor_critic": actor_critic, "sac": sac}


def by_torch(_what_for: str, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, foreach=False)


def main(name: str, *, named: bool) -> None:
    """Train by farstep as one worker of however many, and print what it came to and where."""
    import farstep

    me = farstep.worker()
    sessions: list[str] = []

    def by_farstep(what_for: str, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        options: Any = {"session": what_for} if named else {}
        mode = farstep.Sync(workers=me.count)
        optimizer = farstep.optim.Adam(params, lr=lr, foreach=False, kernel="reference", consistency=mode, **options)
        sessions.append(optimizer.session)
        return optimizer

    print(SCRIPTS[name](by_farstep), *sessions, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], named="--named" in sys.argv)
