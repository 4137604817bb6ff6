"""Compare values without arithmetic: a tensor by its object and version counter, or bit by bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """Remember a value: the object, and the version counter of a tensor."""

    value: Any
    version: int

    @classmethod
    def of(cls, value: Any) -> Seen:
        return cls(value, value._version if isinstance(value, Tensor) else 0)

    def is_still(self, value: Any) -> bool:
        return value is self.value and Seen.of(value).version == self.version


def same_bits(here: Tensor | float, there: Tensor | float) -> bool:
    """Say whether two numbers are equal, or two tensors in every bit, their shape, dtype and device."""
    if not isinstance(here, Tensor) or not isinstance(there, Tensor):
        return not isinstance(here, Tensor) and not isinstance(there, Tensor) and here == there
    if here is there:
        return True
    if here.shape != there.shape or here.dtype != there.dtype or here.device != there.device:
        return False
    return torch.equal(_bits(here), _bits(there))


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return (torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor).view(torch.uint8)
