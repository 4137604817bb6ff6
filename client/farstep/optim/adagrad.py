"""`farstep.optim.Adagrad`: torch's signature, and the options of a session."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.errors import invalid_option
from farstep.optim.base import RemoteOptimizer
from farstep.settings import RemoteOptions


class Adagrad(RemoteOptimizer):
    """Adagrad, each coordinate's step shrinking with the sum of its squared gradients.

    The arguments are those of `torch.optim.Adagrad`, which checks them; the rest are `farstep.RemoteOptions`. What
    `foreach` and `fused` mean on a server is in `docs/optimizers.md`.
    """

    torch_class = torch.optim.Adagrad
    of_constructor = frozenset({"initial_accumulator_value"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, options, remote)

    def share_memory(self) -> None:
        """Do nothing in a session with a name on a server, whose state all its workers share.

        torch's puts the state into memory that forked processes share. A session's state belongs to one process.

        Raises:
            InvalidOption: the session is embedded or private, so that no other process can have its state.
        """
        settings = self._joined().settings
        if settings.server is None or settings.private:
            raise invalid_option(
                "The state of an embedded or private session cannot be shared between processes.",
                remedy="Give each process an optimizer with the same server=... and session=...; they share its state.",
                field="session",
            )
