"""LocalSGD and DiLoCo: training in rounds of many local steps, then one exchange of their result.

    for each of the `every` steps of a round       the inner optimizer steps here, on this worker's own parameters
    at its end     Δ = θ − p                       the pseudo-gradient: the parameters that the round began with, less
                                                   those of now
                   θ ← outer(θ, mean of the Δ)     a step of the session's optimizer, which workers share
                   p ← θ                           the next round begins with the same parameters everywhere

    LocalSGD    outer is SGD with lr=1: θ becomes the mean of the workers' parameters     Stich 2018, arXiv:1805.09767
    DiLoCo      outer is SGD with Nesterov momentum, lr=0.7         Douillard et al. 2023, arXiv:2311.08105

The session may have any mode: `Sync(workers=N)` averages the Δ of N workers, in the order of their names; in `Async()`
each Δ is a step of its own. `rounds` has the common base class.
"""

from __future__ import annotations

from typing import Unpack, final

import torch
from torch import nn

from farstep.local_sgd.rounds import Rounds
from farstep.settings import RemoteOptions

OUTER_LR = 0.7
OUTER_MOMENTUM = 0.9
"""The DiLoCo paper's best values (its section 3.2)."""


@final
class LocalSGD(Rounds):
    """Average the parameters of the workers every so many local steps.

        with farstep.LocalSGD(model, optimizer, every=8, server=..., session=..., consistency=farstep.Sync(workers=4)):
            train(model, optimizer)

    Args:
        model: its parameters that require gradients are synchronised; buffers are not.
        optimizer: steps locally; its state is its own, and stays as it is at a synchronisation.
        every: local steps in a round.
        remote: `farstep.RemoteOptions`: where the session is, and which mode it has.

    Raises:
        InvalidOption: a value that cannot be.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, **remote: Unpack[RemoteOptions]
    ) -> None:
        outer = torch.optim.SGD(self.synchronised(model).values(), lr=1.0)
        super().__init__(model, optimizer, outer, every, remote)


@final
class DiLoCo(Rounds):
    """Let an outer optimizer step along the mean of the changes that the workers' local steps made.

        with farstep.DiLoCo(model, inner, every=500, server=..., session=..., consistency=farstep.Sync(workers=4)):
            train(model, inner)

    Args:
        model: its parameters that require gradients are synchronised; buffers are not.
        inner_optimizer: steps locally, AdamW in the paper; its state is its own, and stays as it is at a
            synchronisation.
        outer_optimizer: an optimizer of `torch.optim` over the same parameters; the session gets its options, groups
            and state, and it is not used itself. Nesterov momentum as in the paper if left out.
        every: local steps in a round, 500 in the paper.
        remote: `farstep.RemoteOptions`: where the session is, and which mode it has.

    Raises:
        InvalidOption: a value that cannot be, or an outer optimizer that has parameters of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        outer_optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        if outer_optimizer is None:
            ours = self.synchronised(model).values()
            outer_optimizer = torch.optim.SGD(ours, lr=OUTER_LR, momentum=OUTER_MOMENTUM, nesterov=True)
        super().__init__(model, inner_optimizer, outer_optimizer, every, remote)
