"""`farstep.optim.ASGD`: torch's signature, and the options of a session."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions


class ASGD(RemoteOptimizer):
    """Averaged stochastic gradient descent; the average is the state entry `ax`.

    The arguments are those of `torch.optim.ASGD`, which checks them; the rest are `farstep.RemoteOptions`. What
    `foreach` and `capturable` mean on a server is in `docs/optimizers.md`.
    """

    torch_class = torch.optim.ASGD
    averages = ("ax",)
    counts_in = frozenset({torch.float32})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, options, remote)
