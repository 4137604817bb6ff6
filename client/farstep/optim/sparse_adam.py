"""`farstep.optim.SparseAdam`: torch's signature, and the options of a session."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.optim.base import RemoteOptimizer
from farstep.optim.options import check_parameters
from farstep.settings import RemoteOptions


class SparseAdam(RemoteOptimizer):
    """Adam for sparse gradients: only the rows that a gradient names change, and their averages.

    The arguments are those of `torch.optim.SparseAdam`, which checks them and the parameters; the rest are
    `farstep.RemoteOptions`.
    """

    torch_class = torch.optim.SparseAdam
    if_missing = MappingProxyType({"maximize": False})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, options, remote)

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super()._check_groups(groups)
        check_parameters(self.torch_class, groups, self.defaults)
