"""The two optimizers that are compared: torch's own, and the one whose update happens in a session."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import farstep
from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions
from farstep_service.demo.training import KERNEL, Training

DEADLINE_S = 30.0
"""How long a step waits for all workers before everybody tries it again."""


def local_optimizer(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's optimizer with the training's options."""
    kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, training.optimizer)
    return kind(model.named_parameters(), **training.options)


def remote_optimizer(training: Training, model: nn.Module, remote: RemoteOptions) -> RemoteOptimizer:
    """Return farstep's optimizer with the same options, joined to the training's session.

    Raises:
        FarstepError: the session exists with other options, is full, or the server does not answer.
    """
    kind: Callable[..., RemoteOptimizer] = getattr(farstep.optim, training.optimizer)
    mode = farstep.Sync(workers=training.workers, deadline_s=DEADLINE_S)
    return kind(model.named_parameters(), **training.options, **{"consistency": mode, "kernel": KERNEL, **remote})
