"""θ, the parameters that a round began with: copies on the CPU, beside the parameters of the model that step away.

    a round begins      p ← θ, or p ← θ + (p − sent) where the model has stepped since its pseudo-gradient was sent
    a view is shown     p ← θ while θ has the view's values, then p is what it was

The copies are what the session's optimizer has as its parameters, so they change when it steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor


@final
class Beginning:
    """The copies of a model's parameters that a session's optimizer steps on.

    Attributes:
        tensors: one for each parameter, in the model's order.
    """

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Copy `values`, which have the names, shapes and dtypes of the model's `parameters`."""
        self._parameters = parameters
        self.tensors: Sequence[Tensor] = [_copied(values[name]) for name in parameters]

    def groups(self, own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the param groups of an optimizer of the model as they are over the copies, with the names."""
        copies = dict(zip(self._parameters.values(), self.tensors, strict=True))
        names = {p: name for name, p in self._parameters.items()}

        def over_copies(params: Sequence[Tensor]) -> dict[str, Any]:
            return {"params": [copies[p] for p in params], "param_names": [names[p] for p in params]}

        return [{**group, **over_copies(group["params"])} for group in own]

    def values(self) -> dict[str, Tensor]:
        """Return what the copies hold, in memory of its own."""
        return {name: copy.detach().clone() for name, copy in zip(self._parameters, self.tensors, strict=True)}

    def has(self, values: Mapping[str, Tensor]) -> bool:
        """Say whether the copies hold these values."""
        return all(
            torch.equal(copy, _copied(values[name])) for name, copy in zip(self._parameters, self.tensors, strict=True)
        )

    @torch.no_grad()
    def take_(self, sent: Sequence[Tensor] | None = None) -> None:
        """Bring the model to the parameters that a round begins with.

        Args:
            sent: the model as it was when the pseudo-gradient was sent, if it has stepped since; those steps stay.
        """
        for index, (p, copy) in enumerate(zip(self._parameters.values(), self.tensors, strict=True)):
            p.copy_(copy if sent is None else copy + (p.detach().to(copy.device) - sent[index]))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Give the model the copies' values inside a `with` block, and then its own back, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self.take_()
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(own[name])

    def forget_gradients_(self) -> None:
        """Leave nothing of a pseudo-gradient that is no longer under way."""
        for copy in self.tensors:
            copy.grad = None


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    """Return what the tensors of one model have in common with those of another that is like it."""
    return {name: (each.shape, each.dtype) for name, each in tensors.items()}


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that a session's optimizer steps on."""
    return tensor.detach().to("cpu", copy=True).contiguous().requires_grad_()
