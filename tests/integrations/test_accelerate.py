"""Hugging Face Accelerate, the package itself: `prepare`, gradient accumulation, clipping, save and load.

`prepare` wraps the optimizer and makes a round trip of its state, every tensor moved to the device; the wrapper passes
a closure by position. A training is compared with the same one on torch's optimizer, bit by bit.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.carrying import Counting
from tests.support.client.twins import check_states
from tests.support.integrations.training import Make, batches, loss_of, model, ours, same, theirs
from tests.support.service.servers import RunningServer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the packages that accelerate finds say about their own imports
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


class Training:
    """A model, its data, optimizer and schedule, prepared.

    Args:
        make: makes the optimizer.
        accumulate: batches to a step.
        seed: of the model.
    """

    def __init__(self, make: Make, *, accumulate: int = 1, seed: int = 0) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        network = model(seed)
        optimizer = make(network.parameters())
        scheduler = StepLR(optimizer, 2, gamma=0.5)
        self.model, self.wrapped, self.loader, self.scheduler = self.accelerator.prepare(
            network, optimizer, batches(), scheduler
        )

    @property
    def optimizer(self) -> Optimizer:
        """Return what was wrapped."""
        assert isinstance(self.wrapped, AcceleratedOptimizer)
        return self.wrapped.optimizer

    def train(self, epochs: int = 1, *, clip: float | None = None) -> Training:
        for _ in range(epochs):
            for inputs, classes in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, inputs, classes))
                    if clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.wrapped.step()
                    self.scheduler.step()
                    self.wrapped.zero_grad()
        return self


def pair(place: RemoteOptions, name: str = "AdamW") -> tuple[Make, Make]:
    return ours(name, place, lr=0.05), theirs(name, lr=0.05)


@pytest.mark.promise("Lightning, Accelerate and `transformers.Trainer` train with torch's bits.", area="bits of torch")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_prepared_training_has_torchs_bits(clip: float | None, accumulate: int, place: RemoteOptions) -> None:
    """Parameters, state, groups and schedule are torch's, with accumulation and clipping and without."""
    here, there = (Training(make, accumulate=accumulate).train(2, clip=clip) for make in pair(place))
    same(here.model, there.model)
    check_states(here.optimizer.state_dict(), there.optimizer.state_dict())
    assert isinstance(here.optimizer, RemoteOptimizer)
    assert here.optimizer.version == 2 * -(-len(batches()) // accumulate)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_a_training_resumed_from_a_saved_state(name: str, place: RemoteOptions, tmp_path: Path) -> None:
    """A fresh model and optimizer that load a saved state end where an uninterrupted training ends."""
    make, plain = pair(place, name)
    whole = Training(make).train()
    whole.accelerator.save_state(str(tmp_path))
    whole.train()
    resumed = Training(make, seed=5)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train()
    there = Training(plain).train(2)
    same(resumed.model, whole.model)
    same(resumed.model, there.model)
    check_states(resumed.optimizer.state_dict(), there.optimizer.state_dict())


def test_a_saved_state_is_interchangeable_with_torchs(place: RemoteOptions, tmp_path: Path) -> None:
    """What one of them saved the other one loads."""
    makers = pair(place)
    whole = Training(makers[1]).train(2)
    for number, (first, second) in enumerate((makers, makers[::-1])):
        Training(first).train().accelerator.save_state(str(tmp_path / str(number)))
        resumed = Training(second, seed=5)
        resumed.accelerator.load_state(str(tmp_path / str(number)))
        same(resumed.train().model, whole.model)


def test_preparing_moves_no_tensor(server: RunningServer) -> None:
    """The round trip of `prepare` sends nothing before the first step, nor when an optimizer is wrapped after steps."""
    transport = Counting()
    make, _ = pair({"server": server.url, "transport": transport, "kernel": "reference"})
    optimizer = make(model().parameters())
    assert isinstance(optimizer, RemoteOptimizer)
    optimizer.state_dict()
    assert transport.during(lambda: Accelerator(cpu=True).prepare(optimizer)) == 0
    training = Training(make).train()
    training.optimizer.state_dict()
    assert transport.during(lambda: Accelerator(cpu=True).prepare(training.optimizer)) == 0


def test_an_accelerated_step_is_one_step(place: RemoteOptions) -> None:
    """While gradients accumulate nothing is pushed, and a step that was not skipped is known as such."""
    make, _ = pair(place)
    training = Training(make, accumulate=2)
    versions = []
    for inputs, classes in training.loader:
        with training.accelerator.accumulate(training.model):
            training.accelerator.backward(loss_of(training.model, inputs, classes))
            training.wrapped.step()
            training.wrapped.zero_grad()
        assert isinstance(training.optimizer, RemoteOptimizer)
        versions.append(training.optimizer.version)
    assert versions == [0, 1, 1, 2, 2, 3]
    assert not training.wrapped.step_was_skipped
    assert torch.is_grad_enabled()
