"""Compare values without arithmetic: a tensor by its object and version counter, or bit by bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """Remember a value: the object, the version counter of a tensor, and what a list holds."""

    value: Any
    version: int
    parts: tuple[Seen, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Seen:
        parts = tuple(map(cls.of, value)) if isinstance(value, list) else ()
        return cls(value, value._version if isinstance(value, Tensor) else 0, parts)

    def is_still(self, value: Any) -> bool:
        if value is not self.value or (isinstance(value, Tensor) and value._version != self.version):
            return False
        return not isinstance(value, list) or (
            len(value) == len(self.parts)
            and all(part.is_still(own) for part, own in zip(self.parts, value, strict=True))
        )


def same_bits(here: Tensor | float, there: Tensor | float) -> bool:
    """Return whether two numbers are equal, or two tensors in every bit, their shape, dtype and device."""
    if not isinstance(here, Tensor) or not isinstance(there, Tensor):
        return not isinstance(here, Tensor) and not isinstance(there, Tensor) and here == there
    if here is there:
        return True
    if here.shape != there.shape or here.dtype != there.dtype or here.device != there.device:
        return False
    return torch.equal(_bits(here), _bits(there))


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return (torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor).view(torch.uint8)
