"""`farstep.optim.RMSprop`: torch's signature, and the options of a session."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions


class RMSprop(RemoteOptimizer):
    """Steps over the root of averaged squares of the gradients, with momentum and centering if asked for.

    The arguments are those of `torch.optim.RMSprop`, which checks them; the rest are `farstep.RemoteOptions`. What
    `foreach` and `capturable` mean on a server is in `docs/optimizers.md`.
    """

    torch_class = torch.optim.RMSprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, options, remote)
