"""`farstep.optim.Rprop`: torch's signature, and the options of a session."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions


class Rprop(RemoteOptimizer):
    """Resilient backpropagation, a step size per element that follows the signs of the gradients.

    The arguments are those of `torch.optim.Rprop`, which checks them; the rest are `farstep.RemoteOptions`. What
    `foreach` and `capturable` mean on a server is in `docs/optimizers.md`.
    """

    torch_class = torch.optim.Rprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "etas": etas,
            "step_sizes": step_sizes,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, options, remote)
