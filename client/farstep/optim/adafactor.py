"""`farstep.optim.Adafactor`: torch's signature, and the options of a session."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions


class Adafactor(RemoteOptimizer):
    """Adafactor, whose second moments of a matrix are one number per row and one per column.

    The arguments are those of `torch.optim.Adafactor`, which checks them; the rest are `farstep.RemoteOptions`. What
    `foreach` means on a server is in `docs/optimizers.md`.
    """

    torch_class = torch.optim.Adafactor
    same_in_autocast = frozenset()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, options, remote)
