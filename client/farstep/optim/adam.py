"""`farstep.optim.Adam`: torch's signature, and the options of a session."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions


class Adam(RemoteOptimizer):
    """Adam, steps of averaged gradients over the root of averaged squares.

    The arguments are those of `torch.optim.Adam`, which checks them; the rest are `farstep.RemoteOptions`. What
    `foreach`, `fused` and `capturable` mean on a server is in `docs/optimizers.md`.
    """

    torch_class = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, options, remote)
