"""A pending pseudo-gradient: repeated unchanged until its outcome is known.

After a push without an answer, a farstep optimizer with other gradients takes another step. That is right for
gradients, which are independent, but not for pseudo-gradients against the same parameters: the later one contains the
earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Options = list[dict[str, Any]]


@dataclass(slots=True)
class Pending:
    """The content of one push, and the steps since.

    Attributes:
        gradients: the pseudo-gradient, one tensor per parameter.
        options: those of the outer optimizer's groups, which are part of the push.
        steps: local steps since then.
    """

    gradients: list[Tensor]
    options: Options
    steps: int = 0

    @classmethod
    def of(cls, outer: torch.optim.Optimizer, bases: Sequence[Tensor], parameters: Sequence[Tensor]) -> Pending:
        """Return the pseudo-gradient of the steps from `bases` to `parameters`."""
        gradients = [base - p.detach().to(base.device) for base, p in zip(bases, parameters, strict=True)]
        return cls(gradients, _options_of(outer))

    def sent(self, bases: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the parameters at the time of sending; None if they have not changed since."""
        return [base - gradient for base, gradient in zip(bases, self.gradients, strict=True)] if self.steps else None

    def push(self, outer: torch.optim.Optimizer, bases: Sequence[Tensor]) -> None:
        """Let the outer optimizer step along it, with the options of the first attempt.

        Raises:
            FarstepError: the session refused it, or no answer came.
        """
        for base, gradient in zip(bases, self.gradients, strict=True):
            base.grad = gradient
        options = _options_of(outer)
        _set_options(outer, self.options)
        try:
            outer.step()
        finally:
            _set_options(outer, options)


def _options_of(optimizer: torch.optim.Optimizer) -> Options:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _set_options(optimizer: torch.optim.Optimizer, options: Options) -> None:
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
