"""θ, the parameters at the start of a round: copies on the CPU, while the model's own parameters step on.

    a round begins      p ← θ, or p ← θ + (p − sent) where the model has stepped since its pseudo-gradient was sent
    a view is shown     p ← θ while θ has the view's values, then p is what it was

The copies are the parameters of the session's optimizer, so its steps change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from farstep.errors import InvalidOption, invalid_option
from farstep.optim.names import named_parameters


@final
class RoundStart:
    """The copies of a model's parameters that a session's optimizer steps on.

    Attributes:
        tensors: one for each parameter, in the model's order.
    """

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Copy `values`, which have the names, shapes and dtypes of the model's `parameters`."""
        self._parameters = parameters
        self.tensors: Sequence[Tensor] = [_copied(values[name]) for name in parameters]

    def groups(self, own: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Return the param groups of an optimizer of the model, over the copies and with their names."""
        copies = dict(zip(self._parameters, self.tensors, strict=True))
        return [
            {**group, "params": [copies[name] for name in each], "param_names": list(each)}
            for group, each in zip(own, names, strict=True)
        ]

    def values(self) -> dict[str, Tensor]:
        """Return the values of the copies, in new memory."""
        return {name: copy.detach().clone() for name, copy in zip(self._parameters, self.tensors, strict=True)}

    def has(self, values: Mapping[str, Tensor]) -> bool:
        """Return whether the copies hold these values."""
        return all(
            torch.equal(copy, _copied(values[name])) for name, copy in zip(self._parameters, self.tensors, strict=True)
        )

    @torch.no_grad()
    def take_(self, sent: Sequence[Tensor] | None = None) -> None:
        """Set the model to the parameters that a round begins with.

        Args:
            sent: the model when the pseudo-gradient was sent, if it has stepped since; those steps are kept.
        """
        for index, (p, copy) in enumerate(zip(self._parameters.values(), self.tensors, strict=True)):
            p.copy_(copy if sent is None else copy + (p.detach().to(copy.device) - sent[index]))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Give the model the copies' values inside a `with` block, and restore its own after it, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self.take_()
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(own[name])

    def forget_gradients_(self) -> None:
        """Drop the gradients of a pseudo-gradient that is no longer pending."""
        for copy in self.tensors:
            copy.grad = None


def follow_(parameters: dict[str, Tensor], model: nn.Module, inner: torch.optim.Optimizer) -> None:
    """Replace tensors of the model by those that it has now under the same names.

    `load_state_dict(assign=True)` and `setattr` replace parameters, and only the present ones can be trained.

    Raises:
        InvalidOption: the model has other parameters to synchronise than before, or the inner optimizer still steps on
            a tensor that the model no longer has.
    """
    now = named_parameters(model)
    for name, p in now.items():
        if name not in parameters and p.requires_grad:
            raise _changed(
                f"Parameter {name!r} requires gradients now, and did not when this context was made: it is not "
                "synchronised, and would be another one on each worker.",
                "Freeze it again, or make a new context, on every worker, when all layers that are to train do.",
                name,
            )
    stepped = {p for group in inner.param_groups for p in group["params"]}
    for name, p in parameters.items():
        if name not in now:
            raise _changed(
                f"Parameter {name!r} is no longer in the model.", "Put it back, or make a new context.", name
            )
        if now[name] is p:
            continue
        if (now[name].shape, now[name].dtype) != (p.shape, p.dtype):
            raise _changed(
                f"Parameter {name!r} is {now[name].dtype} {list(now[name].shape)} now, and was {p.dtype} "
                f"{list(p.shape)} when this context was made.",
                "Put the earlier one back, or make a new context, on every worker.",
                name,
            )
        if p in stepped and now[name] not in stepped:
            raise _changed(
                f"The model has another tensor as parameter {name!r} than the inner optimizer steps.",
                "Put the new one into the optimizer's group, as after load_state_dict(assign=True), or make both anew.",
                name,
            )
    parameters.update({name: now[name] for name in parameters})


def _changed(what: str, remedy: str, name: str) -> InvalidOption:
    return invalid_option(what, remedy=remedy, field=name)


def shapes_and_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    """Return the shapes and dtypes of a model's tensors by name, to compare two models."""
    return {name: (each.shape, each.dtype) for name, each in tensors.items()}


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that a session's optimizer steps on."""
    return tensor.detach().to("cpu", copy=True).contiguous().requires_grad_()
