"""Gradients cast to 16 bits on their way out, in one pass: the cast is the copy into the memory they are sent from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from farstep.errors import NonFinite
from farstep.wire.memory import TORCH_DTYPES


@final
class Narrowing:
    """Memory that float32 gradients are cast into, kept from step to step.

    Args:
        half: the wire's name of a 16-bit dtype.
        parameters: whose gradients they are.
    """

    def __init__(self, half: str, parameters: Sequence[Tensor]) -> None:
        self._dtype = TORCH_DTYPES[half]
        flat = torch.empty(sum(p.numel() for p in parameters if is_wide(p)), dtype=self._dtype)
        self._staged: dict[int, Tensor] = {}
        at = 0
        for index, p in enumerate(parameters):
            if is_wide(p):
                self._staged[index] = flat[at : at + p.numel()].view(p.shape)
                at += p.numel()

    def dense(self, index: int, gradient: Tensor) -> Tensor:
        """Return a parameter's gradient as it travels; the next one of this parameter takes its memory.

        Raises:
            NonFinite: see `_check`.
        """
        staged = self._staged.get(index)
        if staged is None:
            return gradient
        staged.copy_(gradient.detach())
        return self._check(index, staged, gradient)

    def values(self, index: int, values: Tensor) -> Tensor:
        """Return the values of a sparse gradient as they travel.

        Raises:
            NonFinite: see `_check`.
        """
        return self._check(index, values.to(self._dtype), values) if index in self._staged else values

    def _check(self, index: int, narrow: Tensor, wide: Tensor) -> Tensor:
        """Refuse what float16 made infinite; bfloat16 reaches as far as float32. `narrow` is still in the cache.

        Raises:
            NonFinite: a finite number became infinite, which no policy of a session can know.
        """
        if self._dtype is not torch.float16 or bool(torch.isfinite(narrow.sum(dtype=torch.float32))):
            return narrow
        if bool((torch.isinf(narrow).to(wide.device) & torch.isfinite(wide)).any()):
            raise NonFinite(
                f"The gradient of parameter {index} holds a finite number beyond {torch.finfo(torch.float16).max:g}, "
                "which float16 on the wire makes infinite; nothing was sent.",
                remedy="Use wire='bf16', which reaches as far as float32, or scale the loss down.",
                field="wire",
                side="client",
            )
        return narrow


def is_wide(tensor: Tensor) -> bool:
    """Say whether a tensor is of the dtype that is narrowed."""
    return tensor.dtype is torch.float32
