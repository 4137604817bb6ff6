"""Memory for gradients that are sent while others are still being computed.

They are copied here unit by unit, and sent from here: what the server gets is what this memory says, whatever is done
to a gradient meanwhile. So one comparison, byte by byte, tells in the end whether it got the right ones. Version
counters would not: `p.grad.data.clamp_(...)` does not move them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from farstep.tensors import is_plain, is_wide, memcmp, same_bits
from farstep.wire.memory import TORCH_DTYPES, tensor_memory

UNIT_BYTES: Final = 512 * 1024
"""Bytes that are copied at once: they are sent next, while a core's cache still has them."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Some of the elements of one gradient, the last excluded."""

    index: int
    first: int
    last: int


@final
class Stage:
    """Hold one gradient of each parameter as it travels.

    Args:
        parameters: whose gradients they are; on the CPU.
        half: the wire's name of the 16-bit dtype that float32 gradients travel in, None for their own.
    """

    def __init__(self, parameters: Sequence[Tensor], half: str | None) -> None:
        narrow = None if half is None else TORCH_DTYPES[half]
        self._dtypes = [p.dtype for p in parameters]
        dtypes = [narrow if narrow is not None and is_wide(p) else p.dtype for p in parameters]
        self._memory = [
            torch.empty(p.numel(), dtype=dtype, device="cpu") for p, dtype in zip(parameters, dtypes, strict=True)
        ]

    def units(self, order: Sequence[int]) -> list[Unit]:
        """Cut gradients into units, in this order."""
        units = []
        for index in order:
            memory = self._memory[index]
            size = UNIT_BYTES // memory.element_size()
            count = memory.numel()
            units += [Unit(index, first, min(first + size, count)) for first in range(0, count, size)]
        return units

    def nbytes(self, order: Sequence[int]) -> int:
        """Return the bytes that gradients travel in."""
        return sum(self._memory[index].nbytes for index in order)

    def payload(self, order: Sequence[int]) -> list[memoryview]:
        """Return the memory of gradients, in this order."""
        return [tensor_memory(self._memory[index]) for index in order]

    def memory(self, unit: Unit) -> memoryview:
        """Return the memory of a unit."""
        return tensor_memory(self._memory[unit.index][unit.first : unit.last])

    def takes(self, index: int, gradient: Tensor) -> bool:
        """Say whether a gradient is one that can be here: dense, and of its parameter's dtype and size."""
        dense = gradient.layout is torch.strided and gradient.dtype is self._dtypes[index]
        return dense and gradient.numel() == self._memory[index].numel()

    def fill_(self, unit: Unit, gradient: Tensor) -> None:
        """Copy a unit of a plain gradient."""
        self._memory[unit.index][unit.first : unit.last].copy_(gradient.view(-1)[unit.first : unit.last])

    def holds(self, index: int, count: int, gradient: Tensor) -> bool:
        """Say whether the first elements of a plain gradient are, in every bit, those that are here."""
        staged = self._memory[index]
        if staged.dtype is gradient.dtype:
            nbytes = count * staged.element_size()
            here, there = ctypes.c_void_p(gradient.data_ptr()), ctypes.c_void_p(staged.data_ptr())
            return not memcmp(here, there, ctypes.c_size_t(nbytes))
        size = UNIT_BYTES // staged.element_size()
        pairs = zip(torch.split(gradient.view(-1)[:count], size), torch.split(staged[:count], size), strict=True)
        return all(same_bits(wide.to(narrow.dtype), narrow) for wide, narrow in pairs)


def plain(gradient: Tensor) -> Tensor:
    """Return a dense gradient as its elements in row-major order, the same memory where that holds them so."""
    gradient = gradient.detach()
    return gradient if is_plain(gradient) else gradient.cpu().resolve_conj().resolve_neg().contiguous()
