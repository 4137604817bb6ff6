"""`farstep.optim.Muon`: torch's signature, and the options of a session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.optim.options import check_parameters
from farstep.settings import RemoteOptions


class Muon(RemoteOptimizer):
    """Muon, whose momentum is made orthogonal before it is applied; for the matrices of hidden layers.

    The arguments are those of `torch.optim.Muon`, which checks them and the parameters; the rest are
    `farstep.RemoteOptions`.
    """

    torch_class = torch.optim.Muon
    same_in_autocast = frozenset({torch.bfloat16})

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, options, remote)

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super()._check_groups(groups)
        check_parameters(self.torch_class, groups, self.defaults)
