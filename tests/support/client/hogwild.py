"""A process that steps on a model in shared memory, one step for each word that it gets on its standard input.

It is started by `torch.multiprocessing`; the queue says what became of each step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo  # which torch imports with the first optimizer, and takes a second for
from torch import Tensor

import farstep
from farstep.errors import FarstepError

LR = 0.1


def train(
    kind: str, options: dict[str, Any], parameters: list[Tensor], seeds: Any, answers: Any
) -> None:  # pragma: no cover  # in a process of its own
    """Step once along the gradient of each seed, until None comes; answer with "" or what the step was refused with."""
    torch.set_num_threads(1)
    optimizer: Any = None
    while (seed := seeds.get()) is not None:
        try:
            if optimizer is None:
                made: Any = torch.optim.SGD if kind == "torch" else farstep.optim.SGD
                optimizer = made(parameters, lr=LR, momentum=0.9, foreach=False, **options)
            for p in parameters:
                p.grad = gradient(seed, p)
            optimizer.step()
            answers.put("")
        except FarstepError as refused:
            answers.put(str(refused))
    if isinstance(optimizer, farstep.optim.SGD):
        optimizer.close()


def gradient(seed: int, p: Tensor) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
