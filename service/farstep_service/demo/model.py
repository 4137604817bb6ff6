"""The network: two convolutions and two linear layers, 38,282 parameters in 8 tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from farstep.protocol.memory import tensor_memory
from farstep_service.demo.data import SEED, Digits


def build_model(seed: int = SEED) -> nn.Sequential:
    """Return the network with first parameters that depend on the seed alone, and leave torch's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def loss_of(model: nn.Module, batch: Digits) -> Tensor:
    """Return the mean cross entropy over a batch, a 0-dim tensor."""
    compare: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    return compare(model(batch.images), batch.labels)


@torch.no_grad()
def accuracy_of(model: nn.Module, digits: Digits) -> float:
    """Return the share of images that the model recognises, between 0 and 1."""
    recognised = model(digits.images).argmax(dim=1) == digits.labels
    return int(recognised.sum()) / len(digits)


def fingerprint_of(model: nn.Module) -> str:
    """Return a hash of the bytes of all parameters."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(tensor_memory(p.detach()))
    return digest.hexdigest()


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Return the largest absolute difference between parameters of two models of this shape."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
