"""`farstep.optim.AdamW`: torch's signature, and the options of a session."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions


class AdamW(RemoteOptimizer):
    """Adam whose weight decay shrinks the parameters instead of joining the gradient.

    The arguments are those of `torch.optim.AdamW`, which checks them; the rest are `farstep.RemoteOptions`. What
    `foreach`, `fused` and `capturable` mean on a server is in `docs/optimizers.md`.
    """

    torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, options, remote)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take in a state; the decay stays decoupled, as in torch, whatever the state says."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
