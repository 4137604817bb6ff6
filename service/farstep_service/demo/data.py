"""The handwritten digits: 1,797 grey images of 8 x 8 pixels that come with scikit-learn, so nothing is downloaded.

The split into training and test images is fixed by a seed, and so is everything drawn from it: a worker's shard and a
worker's batch at a step are pure functions of their numbers. Whoever asks for the same batch gets the same images, in
another process, after a restart, or in the local run that repeats the training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farstep.errors import FarstepError

SEED = 2024
TEST_IMAGES = 359
"""A fifth of the images, never trained on."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Some images and what they show.

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
    """Return which of `count` training images belong to a worker; the shards are disjoint and cover them all.

    Args:
        worker: the worker's number, from 0.
        workers: how many there are.
    """
    return torch.arange(worker, count, workers, device="cpu")


def shuffled(count: int, *seeds: int) -> Tensor:
    """Return a permutation of `count` indices that depends on the seeds and nothing else."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed) % 2**63
    return torch.randperm(count, device="cpu", generator=torch.Generator().manual_seed(mixed))
