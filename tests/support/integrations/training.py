"""What the callers train: a model of three layers and data drawn from a seed, the same for farstep and for torch.

Each test trains twice, with `ours` in a session and with `theirs` in `torch.optim`, and compares all parameters bit by
bit. Reference kernels equal torch's loop over tensors, so torch is told `foreach=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import farstep
from farstep.settings import RemoteOptions
from tests.support.client.twins import check_equal

Make = Callable[..., torch.optim.Optimizer]
"""Given parameters and torch's options, return an optimizer."""


def model(seed: int = 0) -> nn.Sequential:
    """Return a small network with batch statistics, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def dataset(seed: int = 1, count: int = 24) -> TensorDataset:
    """Return inputs and classes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator))


def batches(seed: int = 1, count: int = 24, size: int = 4) -> DataLoader[Any]:
    """Return the data in batches, in order."""
    return DataLoader(dataset(seed, count), batch_size=size)


def loss_of(network: nn.Module, inputs: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    return nn.functional.cross_entropy(network(inputs), classes)


def ours(name: str, place: RemoteOptions, **options: Any) -> Make:
    """Return a maker of farstep's optimizer of a name, at a place."""
    kind: Make = getattr(farstep.optim, name)
    return lambda params: kind(params, foreach=False, **options, **place)


def theirs(name: str, **options: Any) -> Make:
    """Return a maker of torch's optimizer of a name."""
    kind: Make = getattr(torch.optim, name)
    return lambda params: kind(params, foreach=False, **options)


def same(here: nn.Module | Iterable[Tensor], there: nn.Module | Iterable[Tensor]) -> None:
    """Compare models, buffers included, or tensors, bit by bit."""
    one = [*here.state_dict().values()] if isinstance(here, nn.Module) else [p.detach() for p in here]
    other = [*there.state_dict().values()] if isinstance(there, nn.Module) else [p.detach() for p in there]
    check_equal(one, other)
