"""The task: handwritten digits, and a network that learns them.

The digits are 1,797 grey images of 8 x 8 pixels that come with scikit-learn, so nothing is downloaded. A seed fixes the
split into training and test images and all that is drawn from it: a worker's shard, and its batch at a step, are pure
functions of their numbers. A batch has the same images in another process, after a restart, and in the local run that
repeats the training.

The network has two convolutions and two linear layers: 38,282 parameters in 8 tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farstep.errors import FarstepError
from farstep.protocol.memory import tensor_memory

SEED = 2024
TEST_IMAGES = 359
"""A fifth of the images, never trained on."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Images and their labels.

    Attributes:
        images: float32, shape (n, 1, 8, 8), between 0 and 1.
        labels: int64, shape (n,), between 0 and 9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Digits:
        """Return the images at `indices`, in that order."""
        return Digits(self.images[indices], self.labels[indices])


def load_digits(seed: int = SEED) -> tuple[Digits, Digits]:
    """Return the training and the test images.

    Raises:
        FarstepError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as exc:
        raise FarstepError(
            "The demo's digits come with scikit-learn, which is not installed.",
            remedy="Run: pip install 'farstep[demo]'",
            side="client",
        ) from exc
    bundle = load()
    everything = Digits(
        torch.as_tensor(bundle.images, dtype=torch.float32, device="cpu").div(16).unsqueeze(1),
        torch.as_tensor(bundle.target, dtype=torch.int64, device="cpu"),
    )
    order = shuffled(len(everything), seed)
    return everything.take(order[TEST_IMAGES:]), everything.take(order[:TEST_IMAGES])


def shard(count: int, worker: int, workers: int) -> Tensor:
    """Return the indices of a worker's training images, of `count`; the shards are disjoint and cover them all.

    Args:
        worker: the worker's number, from 0.
        workers: the number of workers.
    """
    return torch.arange(worker, count, workers, device="cpu")


def shuffled(count: int, *seeds: int) -> Tensor:
    """Return a permutation of `count` indices that depends on the seeds alone."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed) % 2**63
    return torch.randperm(count, device="cpu", generator=torch.Generator().manual_seed(mixed))


def build_model(seed: int = SEED) -> nn.Sequential:
    """Return the network with initial parameters that depend on the seed alone; torch's random state stays as it is."""
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
    """Return the share of images that the model classifies correctly, between 0 and 1."""
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
    """Return the largest absolute difference between the parameters of two models."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
