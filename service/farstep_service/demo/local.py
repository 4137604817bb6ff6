"""The same training without a server: one process, `torch.optim`, the workers' gradients averaged by hand.

A sync session reduces g = (g₀ + g₁ + ...) / N in the order of the workers and steps once. So does this loop, with the
same batches from the same first parameters. What the demo shows is that the two end at the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from farstep_service.demo.model import build_model, loss_of
from farstep_service.demo.training import Training, local_optimizer

OnStep = Callable[[int, float], None]
"""Called after each step with the number of steps done and the mean of the workers' losses."""


def train_locally(training: Training, on_step: OnStep = lambda step, loss: None) -> nn.Sequential:
    """Return the trained model."""
    with one_thread():
        model = build_model(training.seed)
        optimizer = local_optimizer(training, model)
        for step in range(training.steps):
            losses = []
            for worker in range(training.workers):
                # Nothing is zeroed in between, so backward adds: g₀ + g₁ + ..., in the order of the workers.
                loss = loss_of(model, training.batch(step, worker))
                torch.autograd.backward(loss)
                losses.append(loss.item())
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(training.workers)
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1, sum(losses) / len(losses))
    return model


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the workers do: more threads add up in another order, and the bits would differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
