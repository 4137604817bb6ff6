"""A pseudo-gradient on its way: repeated exactly as it was, until it is known what became of it.

A farstep optimizer that steps with other gradients after a push without an answer takes another step. Gradients have
nothing in common, so that is right; pseudo-gradients against the same parameters have: the later one holds the earlier.
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
    """What was sent as one push, and what has happened since.

    Attributes:
        gradients: the pseudo-gradient, one tensor per parameter.
        options: those of the outer optimizer's groups; with others it would be another push.
        steps: local steps since then.
    """

    gradients: list[Tensor]
    options: Options
    steps: int = 0

    @classmethod
    def of(cls, outer: torch.optim.Optimizer, bases: Sequence[Tensor], parameters: Sequence[Tensor]) -> Pending:
        """Return what the steps from `bases` to `parameters` came to."""
        gradients = [base - p.detach().to(base.device) for base, p in zip(bases, parameters, strict=True)]
        return cls(gradients, _options_of(outer))

    def sent(self, bases: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the parameters as they were when this was sent; None if they still are that."""
        return [base - gradient for base, gradient in zip(bases, self.gradients, strict=True)] if self.steps else None

    def push(self, outer: torch.optim.Optimizer, bases: Sequence[Tensor]) -> None:
        """Let the outer optimizer step along it, under the options of the first time.

        Raises:
            FarstepError: what the session refused, or no answer came.
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
